// What a launch works on, and how large its parts are.
#pragma once

#include "../../types.h"
#include "../runtime.cuh"

#include <cstdint>

namespace talib_fast::spectral_tail {

constexpr int kMostRows = 256;  // of a matrix that these kernels take
constexpr int kTile = 32, kPanel = 64, kGramThreads = 256;
constexpr int kColumnThreads = 256, kVectors = 4;  // of value_kernel and gradient_kernel; vectors at a time

// A tensor of matrices, and what belongs to them.
struct Operand {
  const void* input;
  void* gradient;      // of the input's dtype; null in the forward pass
  double* vectors;     // [count, m, directions]
  void* value;         // [count] of the accumulation dtype; in the backward pass the value's gradient
  double* grams;       // [count, slices, pairs of tiles, tile_side, tile_side]
  double* spilled;     // [count, spilled_size], the first rows of triangles that shared memory has no room for
  double* iterations;  // [count, directions, iteration_size]; null: they are in shared memory
  double* sums;        // [count, chunks], of value_kernel's blocks
  unsigned* arrived;   // [count]
  Matrices matrices, gradients;
  int directions;  // of the tail or, with `complement`, of what is not the tail
  bool complement;
  int slices;  // of the columns, in gram_kernel
  int spilled_rows;
  int columns;  // that a block of value_kernel or gradient_kernel takes, a power of two
  int scratch;  // doubles in shared memory for sums by warp, and for iterations if they fit
  unsigned first_block;
  FloatType type;
};

constexpr int kOperands = 12;
struct List {  // the parameters of one launch, which takes 4 KB
  Operand operands[kOperands];
  int count;
};
static_assert(sizeof(List) < 4000);

// upper triangles of tiles and of elements, by rows: [i, j] with i <= j of `size`
constexpr int triangle_start(int row, int size) { return row * size - row * (row - 1) / 2; }
constexpr int triangle_size(int size) { return size * (size + 1) / 2; }

// rows of a tile in memory: all of kTile, unless the matrix itself has fewer
constexpr int tile_side(int64_t m) { return m < kTile ? static_cast<int>(m) : kTile; }

// what the iteration for one vector needs, in doubles; odd, so that neighbouring threads use different banks
constexpr int iteration_size(int m) { return (5 * m + (m + 7) / 8) | 1; }
constexpr int kSolverVectors = 9;  // of m doubles, that solve_kernel always has in shared memory

constexpr int64_t chunks(const Operand& operand) { return ceil_div(operand.matrices.n, operand.columns); }

// Copies rows × columns elements: [row, column] goes to to[row * pitch + column], and 0 where the matrix has none.
// `columns` is a power of two. Neighbouring threads read neighbouring elements.
template <typename T, typename To>
__device__ __forceinline__ void load_columns(const T* matrix, const Matrices& shape, int first_row, int rows,
                                             int64_t first_column, int64_t end, int columns, To* to, int pitch) {
  const bool by_rows = shape.row_stride < shape.column_stride;
  for (int e = threadIdx.x; e < rows * columns; e += blockDim.x) {
    const int row = by_rows ? e % rows : e / columns, column = by_rows ? e / rows : e & (columns - 1);
    const bool inside = first_row + row < shape.m && first_column + column < end;
    const int64_t at = (first_row + row) * shape.row_stride + (first_column + column) * shape.column_stride;
    to[row * pitch + column] = inside ? static_cast<To>(to_acc(matrix[at])) : To(0);
  }
}

}  // namespace talib_fast::spectral_tail
