// Gram matrices, in double.
#pragma once

#include "operand.cuh"

namespace talib_fast::spectral_tail {

__global__ void __launch_bounds__(kGramThreads) gram_kernel(const __grid_constant__ List list) {
  constexpr int kPitch = kPanel + 1, kSide = 16, kEach = kTile / kSide;  // a thread takes kEach × kEach elements
  constexpr int kTileSize = kTile * kPitch;
  static_assert(kSide * kSide == kGramThreads);
  SIMT_SHARED(double, row_tile, kTileSize);
  SIMT_SHARED(double, column_tile, kTileSize);
  const Operand& operand = find_operand(list);
  const Matrices& shape = operand.matrices;
  const int side = static_cast<int>(ceil_div(shape.m, kTile)), pairs = triangle_size(side);
  const unsigned block = blockIdx.x - operand.first_block;
  const unsigned slice = block / pairs % operand.slices, index = block / pairs / operand.slices;
  int pair = block % pairs, row = 0;
  for (; pair >= side - row; ++row) pair -= side - row;
  const int column = row + pair;

  const int64_t width = ceil_div(ceil_div(shape.n, operand.slices), kPanel) * kPanel;
  const int64_t begin = slice * width, end = min(shape.n, begin + width);
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  const double* columns = row == column ? row_tile : column_tile;
  double sums[kEach][kEach] = {};
  for (int64_t first = begin; first < end; first += kPanel) {
    with_type(operand.type, [&](auto zero) {
      using T = decltype(zero);
      const T* matrix = static_cast<const T*>(operand.input) + index * shape.stride;
      load_columns(matrix, shape, row * kTile, kTile, first, end, kPanel, row_tile, kPitch);
      if (row != column) load_columns(matrix, shape, column * kTile, kTile, first, end, kPanel, column_tile, kPitch);
    });
    __syncthreads();
#pragma unroll 4
    for (int l = 0; l < kPanel; ++l) {
      double a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) a[i] = row_tile[(y + i * kSide) * kPitch + l];
#pragma unroll
      for (int j = 0; j < kEach; ++j) b[j] = columns[(x + j * kSide) * kPitch + l];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] += a[i] * b[j];
    }
    __syncthreads();
  }
  const int pitch = tile_side(shape.m);
  double* tile = operand.grams + static_cast<int64_t>(block) * pitch * pitch;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int tile_row = y + i * kSide, tile_column = x + j * kSide;
      if (tile_row < pitch && tile_column < pitch) tile[tile_row * pitch + tile_column] = sums[i][j];
    }
}

}  // namespace talib_fast::spectral_tail
