// How a tensor is cut into what blocks and threads work on.
#pragma once

#include <cstdint>

namespace talib_fast::stoch_norm {

constexpr int kMaxThreads = 512;             // of a block of the resident schedule
constexpr int kSlicedThreads = 256;          // of the sliced one
constexpr int kBlocksPerMultiprocessor = 2;  // likewise; with three, 80 registers a thread, some would spill

// How a tensor [outer, channels, inner] is cut into groups of channels, which a block takes whole or blocks share:
//
// runs: a group is one channel, whose elements lie in runs of `inner`. All elements of a vector are of that channel.
// rows: a group is as many neighbouring channels as fill vectors. In channels_last (inner = 1) they make some 128
//       bytes; elsewhere they end where a run and a vector end together, as 8 channels of 7 × 7 do. Their elements lie
//       side by side in rows. A vector has elements of V channels in channels_last, elsewhere of two at most.
//
// In rows a block's threads form columns, each a vector wide, and go down the rows. A column's vectors are its steps.
struct Geometry {
  int64_t channels, run;              // run: inner
  int64_t row;                        // elements from a run to the channel's next one, and from a row to the next
  int64_t steps, slice_steps;         // of a column; in a slice
  unsigned groups, slices;            // slices: of a group
  unsigned sections, section_slices;  // many slices are merged by sections, so that no block has all of them to merge
  int group_channels, log_channels;   // a power of two, and its log2
  int columns, lane_rows;             // of a block's threads: columns × rows
  int log_lanes;                      // log2 of how many neighbouring lanes merge a channel's sums
  int scratch_bytes;                  // of shared memory, beside what is kept
  bool whole_words;                   // of signs: a word's elements are written by one warp at a time
  // in runs a thread's way from one of its vectors to the next; in rows jump alone:
  int64_t inner_steps;        // vectors in a run
  int64_t jump, jump_in_run;  // elements; vectors within the run
  int64_t wrap;               // elements on top if that leads past the end of the run
};

}  // namespace talib_fast::stoch_norm
