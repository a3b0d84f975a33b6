// Decides what the launches for an operand look like, on a GPU.
#pragma once

#include "projection.cuh"
#include "solve.cuh"

#include <algorithm>
#include <cstdint>

namespace talib_fast::spectral_tail {

// Memory for a launch in one allocation: the first pass only counts.
struct Workspace {
  char* memory = nullptr;
  int64_t bytes = 0;

  template <typename T>
  T* take(int64_t count) {
    T* taken = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + bytes);
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return taken;
  }
};

inline int solver_columns(const Operand& operand) {
  return operand.matrices.m > 128 ? 8 : operand.matrices.m > 64 ? 4 : 2;
}

inline int solver_threads(const Operand& operand, const Device& device) {
  return std::min(solver_threads(solver_columns(operand)), device.threads_per_block / kWarp * kWarp);
}

inline int64_t solver_bytes(const Operand& operand) {
  const int m = static_cast<int>(operand.matrices.m);
  const int rows = triangle_size(m) - triangle_start(operand.spilled_rows, m);
  return static_cast<int64_t>(sizeof(double)) * (kSolverVectors * m + operand.scratch + rows);
}

// As many columns as suit both passes: whole cache lines, if shared memory allows.
inline void choose_columns(Operand& operand) {
  const int64_t element_bytes = operand.type == FloatType::kDouble ? sizeof(double) : sizeof(float);
  for (operand.columns = 32; operand.columns > 8; operand.columns /= 2)
    if (column_bytes(operand.matrices.m, operand.directions, operand.columns, element_bytes) <= kAlwaysAllowed) break;
}

// Decides what the forward pass of an operand looks like; `operands` is how many share the launches.
inline void plan_forward(Operand& operand, size_t operands, const Device& device, Workspace& workspace) {
  constexpr int64_t kLeastSlice = 2 * kPanel;
  const int64_t count = operand.matrices.count;
  const int m = static_cast<int>(operand.matrices.m), warps = solver_threads(operand, device) / kWarp;
  const int iterations = operand.directions * iteration_size(m);
  const int64_t pairs = triangle_size(static_cast<int>(ceil_div(m, kTile)));
  // a block for each multiprocessor, or more if the matrices are many
  operand.slices =
      static_cast<int>(std::min(ceil_div(operand.matrices.n, kLeastSlice),
                                ceil_div(device.multiprocessors, pairs * count * static_cast<int64_t>(operands))));

  // scratch has the sums by warp and then, in their place, the iterations; the triangle follows it, and may spill rows
  const bool roomy = [&] {
    operand.spilled_rows = 0, operand.scratch = std::max(warps * m, iterations);
    return solver_bytes(operand) <= device.shared_bytes;
  }();
  if (!roomy) operand.scratch = warps * m;
  while (solver_bytes(operand) > device.shared_bytes) ++operand.spilled_rows;
  choose_columns(operand);

  const int64_t tile = tile_side(m) * tile_side(m);
  operand.grams = workspace.take<double>(operand.directions == 0 ? 0 : count * operand.slices * pairs * tile);
  operand.spilled = workspace.take<double>(count * triangle_start(operand.spilled_rows, m));
  operand.iterations = iterations > operand.scratch ? workspace.take<double>(count * iterations) : nullptr;
  operand.sums = workspace.take<double>(count * chunks(operand));
  operand.arrived = workspace.take<unsigned>(count);
}

}  // namespace talib_fast::spectral_tail
