// How a list of tensors is cut into launches and blocks.
#pragma once

#include "../../types.h"
#include "../driver.h"
#include "operand.cuh"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace talib_fast::squared_distance {

// One launch: neighbouring operands of the list, and how they are cut.
struct Launch {
  const Operand* operands;
  int first, count;
  unsigned blocks;
  int64_t chunk_bytes;
};

// How many operands a launch can take.
inline size_t most_operands() { return driver_takes_many_parameters() ? kManyOperands : kFewOperands; }

// Decides how the operands are cut, and gives them their blocks. A block takes so much that there are few sums to add
// up, and so little that no block is waited for. An empty operand has a block too, for its term.
inline std::vector<Launch> plan(std::vector<Operand>& operands, int multiprocessors) {
  // 64 KB are 256 bytes a thread, some rounds of loads. Beside them finding the tensor and summing up the block hardly
  // count. 32 blocks are ten times as many as a multiprocessor has room for. So little is idle at the end, and the last
  // block of all adds up only a few thousand sums.
  constexpr int64_t kSmallest = 64 << 10, kBlocksPerMultiprocessor = 32;
  int64_t bytes = 0;
  for (const Operand& operand : operands) bytes += operand.elements << operand.bytes_log2;
  const int64_t chunk_bytes =
      kSmallest * std::max<int64_t>(1, ceil_div(bytes, kSmallest * kBlocksPerMultiprocessor * multiprocessors));
  std::vector<Launch> launches;
  const size_t most = most_operands();
  for (size_t first = 0; first < operands.size(); first += most) {
    const size_t count = std::min(most, operands.size() - first);
    unsigned blocks = 0;
    for (size_t j = first; j < first + count; ++j) {
      Operand& operand = operands[j];
      operand.first_block = blocks;
      blocks += std::max(1u, static_cast<unsigned>(ceil_div(operand.elements, chunk_bytes >> operand.bytes_log2)));
    }
    launches.push_back({&operands[first], static_cast<int>(first), static_cast<int>(count), blocks, chunk_bytes});
  }
  return launches;
}

template <int kOperands>
void fill(List<kOperands>& list, const Launch& launch) {
  std::copy_n(launch.operands, launch.count, list.operands);
  list.count = launch.count, list.chunk_bytes = launch.chunk_bytes;
  while ((launch.blocks - 1) >> list.stretch_log2 >= List<kOperands>::kStretches) ++list.stretch_log2;
  int j = 0;
  for (int stretch = 0; stretch <= List<kOperands>::kStretches; ++stretch) {
    const uint64_t block = uint64_t{static_cast<unsigned>(stretch)} << list.stretch_log2;
    while (j + 1 < launch.count && launch.operands[j + 1].first_block <= block) ++j;
    list.first_operands[stretch] = static_cast<uint16_t>(j);
  }
}

// f(the launch's parameters), in a list as short as the operands allow
template <typename F>
void with_list(const Launch& launch, const F& f) {
  const auto with = [&](auto list) {
    fill(list, launch);
    f(list);
  };
  if (launch.count <= kFewOperands) with(List<kFewOperands>{});
  else with(List<kManyOperands>{});
}

}  // namespace talib_fast::squared_distance
