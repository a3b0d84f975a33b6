// A block takes one Gram matrix, from its tiles to the singular directions.
#pragma once

#include "eigenvectors.cuh"

#include <cfloat>
#include <limits>

namespace talib_fast::spectral_tail {

// threads of a block: few enough for the registers that each needs
constexpr int solver_threads(int columns) { return columns == 8 ? 384 : columns == 4 ? 512 : 256; }

// Matrices of at most kWarp * kColumns rows, a block each.
template <int kColumns, bool kSpilled>
__global__ void __launch_bounds__(solver_threads(kColumns), 1) solve_kernel(const __grid_constant__ List list) {
  SIMT_DYN_SHARED(double, shared);
  const Operand& operand = find_operand(list);
  const unsigned index = blockIdx.x - operand.first_block;
  const int m = static_cast<int>(operand.matrices.m), directions = operand.directions;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x == 0) operand.arrived[index] = 0;  // for value_kernel
  if (directions == 0) return;                       // all of the matrix is its tail
  const Solver s(shared, m, directions);
  const Triangle<kSpilled> a{operand.spilled + static_cast<int64_t>(index) * triangle_start(operand.spilled_rows, m),
                             s.scratch + operand.scratch, m, operand.spilled_rows};
  double* vectors = operand.vectors + static_cast<int64_t>(index) * m * directions;

  const int side = (m + kTile - 1) / kTile, pairs = triangle_size(side), pitch = tile_side(m);
  const int64_t slice_size = static_cast<int64_t>(pairs) * pitch * pitch;
  const double* grams = operand.grams + static_cast<int64_t>(index) * operand.slices * slice_size;
  for (int i = warp; i < m; i += warps)
    for (int j = i / kTile * kTile + lane; j < m; j += kTile) {
      if (j < i) continue;
      const int pair = triangle_start(i / kTile, side) + j / kTile - i / kTile;
      const double* element = grams + (pair * pitch + i % kTile) * pitch + lane;
      double sum = 0;
#pragma unroll 4
      for (int slice = 0; slice < operand.slices; ++slice) sum += element[slice * slice_size];
      a.at(i, j) = sum;
    }
  __syncthreads();
  double trace = 0;
  for (int i = lane; i < m; i += kWarp) trace += a.at(i, i);
  trace = warp_sum(trace);
  if (trace == 0 || !(trace <= DBL_MAX)) {  // zeros, or not finite
    for (int i = threadIdx.x; i < m * directions; i += blockDim.x)
      vectors[i] = trace == 0 ? i / directions == i % directions : std::numeric_limits<double>::quiet_NaN();
    return;
  }
  __syncthreads();
  const double scale = operand.complement ? -trace : trace;  // the largest are the smallest with the other sign
  for (int i = warp; i < m; i += warps)
    for (int j = i + lane; j < m; j += kWarp) a.at(i, j) /= scale;
  __syncthreads();

  tridiagonalize<kColumns>(a, s);
  const double bound = smallest_eigenvalues(s);
  double* iterations = s.scratch;
  if (operand.iterations != nullptr)
    iterations = operand.iterations + static_cast<int64_t>(index) * directions * iteration_size(m);
  eigenvectors(s, bound, iterations);
  reflect_back<kColumns>(a, s, iterations, vectors);
}

}  // namespace talib_fast::spectral_tail
