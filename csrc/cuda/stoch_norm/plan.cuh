// Decides what a launch looks like, for a shape and a GPU.
#pragma once

#include "worker.cuh"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace talib_fast::stoch_norm {

struct Shape {
  int64_t outer, channels, inner;
};

struct Plan {
  Geometry geometry;
  int threads, blocks;
  bool resident;
  size_t shared_bytes, workspace_bytes;
  int64_t counters;  // in global memory
  unsigned lag;      // sliced: how far the second pass is behind the first one, in slices beyond a group
};

inline int most_threads(const Device& device) {
  return std::min(kMaxThreads, device.threads_per_block / kWarp * kWarp);
}
inline int few_threads(const Device& device) { return std::min(kSlicedThreads, most_threads(device)); }

// The largest n with 1 << n <= value.
constexpr int log2_floor(int64_t value) { return value < 2 ? 0 : 1 + log2_floor(value / 2); }

// Decides everything about a launch, for vectors of V elements.
template <typename Op, int V, bool kRows>
Plan choose_plan(const Shape& shape, const Device& device) {
  using W = Worker<Op, V, kRows>;
  constexpr int64_t kElementBytes = sizeof(typename Op::Element), kVectorBytes = Op::kTensors * V * kElementBytes;
  // With these, an item spends a third of its time in rows, and two fifths in runs, beside its loop
  // (benchmarks/gpu_model.py). Longer slices would reduce that, but leave blocks idle at the end, and less in the cache
  // for the second pass.
  constexpr int64_t kMostSliceBytes = (kRows ? 48 : 64) << 10;
  // To share a group takes time beside the reading. In that time one block alone reads so much.
  constexpr int64_t kSmallGroupBytes = 64 << 10;
  constexpr int kRowBytes[] = {128, 64, 32};  // of channels_last: cache lines, or the least that memory reads
  const bool channels_last = kRows && shape.inner == 1;
  Plan plan{};
  Geometry& g = plan.geometry;
  g.channels = shape.channels;
  g.run = shape.inner;
  g.row = shape.channels * shape.inner;
  g.steps = kRows ? shape.outer : shape.outer * shape.inner / V;
  g.inner_steps = kRows ? 1 : shape.inner / V;

  const auto cut = [&](int row_bytes) {
    g.columns = 1;
    if (channels_last)
      while (g.columns < kWarp && 2 * g.columns * V * kElementBytes <= row_bytes && g.columns * V < shape.channels &&
             2 * g.columns * V <= few_threads(device))
        g.columns *= 2;
    else if (kRows) g.columns = static_cast<int>(shape.inner / std::gcd<int64_t>(shape.inner, V));
    g.group_channels = kRows ? static_cast<int>(g.columns * V / shape.inner) : 1;
    g.log_channels = log2_floor(g.group_channels);
    g.groups = static_cast<unsigned>(ceil_div(shape.channels, g.group_channels));
    g.whole_words = g.row % kSignsPerWord == 0 && g.group_channels * g.run % kSignsPerWord == 0;
  };
  const auto group_bytes = [&] { return g.steps * g.columns * kVectorBytes; };
  const auto set_threads = [&](int most, bool resident) {
    g.lane_rows = most / g.columns;
    plan.threads = static_cast<int>(ceil_div(g.lane_rows * g.columns, kWarp) * kWarp);
    const int warps = plan.threads / kWarp;
    const int entries = kRows && !channels_last ? kWarp : std::min(kWarp, 2 * warps - 1);
    g.log_lanes = log2_floor(std::min(entries, plan.threads / g.group_channels));
    g.jump_in_run = kRows ? 0 : g.lane_rows % g.inner_steps;
    g.jump = kRows ? g.lane_rows * g.row : g.lane_rows / g.inner_steps * g.row + g.jump_in_run * V;
    g.wrap = g.row - g.inner_steps * V;
    g.scratch_bytes = static_cast<int>(W::scratch_bytes(g, plan.threads));
    plan.shared_bytes = g.scratch_bytes + (resident ? ceil_div(g.steps, g.lane_rows) * plan.threads * kVectorBytes : 0);
    return static_cast<int64_t>(plan.shared_bytes);
  };

  for (const int row_bytes : kRowBytes) {
    cut(row_bytes);
    // Few groups leave multiprocessors idle. Nearly half of the multiprocessors still read at the memory's speed.
    const bool enough = 16 * int64_t{g.groups} >= 7 * device.multiprocessors || group_bytes() <= kSmallGroupBytes;
    plan.resident = enough && set_threads(most_threads(device), true) <= device.shared_bytes;
    if (plan.resident || !channels_last) break;
  }
  if (plan.resident) {
    // a multiprocessor holds only one or two blocks of large groups, so they are wide
    if (4 * set_threads(few_threads(device), true) > device.shared_bytes) set_threads(most_threads(device), true);
    plan.blocks = static_cast<int>(g.groups);
    g.slices = g.sections = 1;
    return plan;
  }

  // Between the two passes over a group, the cache has to hold the group and a slice for each block. They may take six
  // tenths of it. The rest is for a residual, and because the cache does not always replace what is oldest.
  const int64_t blocks = kBlocksPerMultiprocessor * device.multiprocessors;
  const int64_t most_slice = std::max<int64_t>(1, std::min<int64_t>(kMostSliceBytes, device.cache_bytes / 3 / blocks));
  const auto stays_in_cache = [&] {
    return (group_bytes() + blocks * most_slice) * (Op::kTensors + 1) / Op::kTensors <= device.cache_bytes / 10 * 6;
  };
  cut(kRowBytes[0]);
  if (channels_last && !stays_in_cache()) {
    cut(kRowBytes[1]);
    if (!stays_in_cache()) cut(kRowBytes[0]);
  }
  set_threads(few_threads(device), false);
  // Slices are the same whatever follows the norm, and so are the bits of the sums. A slice ends where all threads have
  // had equally many vectors. Where blocks have only a few slices each, they have equally many.
  int64_t slices = ceil_div(group_bytes(), most_slice);
  const int64_t rounds = ceil_div(g.groups * slices, blocks);
  if (rounds <= 4) slices = std::max(slices, rounds * blocks / g.groups);
  g.slice_steps = ceil_div(ceil_div(g.steps, slices), g.lane_rows) * g.lane_rows;
  g.slices = static_cast<unsigned>(ceil_div(g.steps, g.slice_steps));
  const int64_t merged_at_once = 4 * std::max(plan.threads >> g.log_channels, 1);
  g.section_slices = g.slices <= 2 * merged_at_once
                         ? g.slices
                         : std::max<unsigned>(merged_at_once, 1u << (log2_floor(g.slices) + 1) / 2);
  g.sections = static_cast<unsigned>(ceil_div(g.slices, g.section_slices));
  const int64_t items = int64_t{g.groups} * g.slices, sections = g.sections > 1 ? int64_t{g.groups} * g.sections : 0;
  plan.blocks = static_cast<int>(std::min(blocks, 2 * items));
  plan.lag = static_cast<unsigned>(std::min<int64_t>(items - g.slices, plan.blocks));
  plan.workspace_bytes = sizeof(typename Op::Sums) * (items + sections) * g.group_channels +
                         sizeof(typename Op::K) * g.groups * g.group_channels;
  plan.counters = 1 + g.groups + sections;
  return plan;
}

}  // namespace talib_fast::stoch_norm
