// Value and gradient, from the part of the matrix that lies in the directions of the tail.
#pragma once

#include "operand.cuh"

#include <cfloat>
#include <limits>

namespace talib_fast::spectral_tail {

// What a block needs in shared memory for its columns, in bytes.
constexpr int64_t column_bytes(int64_t m, int directions, int columns, int64_t element_bytes) {
  return (static_cast<int64_t>(directions) * columns + kColumnThreads * kVectors) *
             static_cast<int64_t>(sizeof(double)) +
         m * (columns + 1) * element_bytes;
}

// Columns of a matrix in shared memory, and what gives their part in the tail.
template <typename A>
struct Columns {
  const A* tile;            // [m, columns + 1]
  const double* projected;  // [directions, columns]
  const double* vectors;    // [m, directions]
  int columns, directions;
  bool complement;

  __device__ __forceinline__ double tail_part(int row, int column) const {
    double sum = 0;
    for (int l = 0; l < directions; ++l) sum += vectors[row * directions + l] * projected[l * columns + column];
    return complement ? static_cast<double>(tile[row * (columns + 1) + column]) - sum : sum;
  }
};

// Loads columns from `first` on and projects them on all vectors. The whole block takes part.
template <typename T>
__device__ __forceinline__ Columns<acc_t<T>> load_and_project(const Operand& operand, unsigned index, int64_t first,
                                                              double* projected) {
  const Matrices& shape = operand.matrices;
  const int m = static_cast<int>(shape.m), directions = operand.directions, columns = operand.columns;
  const int pitch = columns + 1;
  double* partial = projected + directions * columns;  // [parts of the rows, kVectors, columns]
  acc_t<T>* tile = reinterpret_cast<acc_t<T>*>(partial + kColumnThreads * kVectors);
  const double* vectors = operand.vectors + static_cast<int64_t>(index) * m * directions;
  load_columns(static_cast<const T*>(operand.input) + index * shape.stride, shape, 0, m, first, shape.n, columns, tile,
               pitch);
  __syncthreads();
  const int column = threadIdx.x & (columns - 1), part = threadIdx.x / columns, parts = kColumnThreads / columns;
  for (int begin = 0; begin < directions; begin += kVectors) {
    double sums[kVectors] = {};
    for (int i = part; i < m; i += parts) {
      const double element = static_cast<double>(tile[i * pitch + column]);
#pragma unroll
      for (int l = 0; l < kVectors; ++l)
        if (begin + l < directions) sums[l] += vectors[i * directions + begin + l] * element;
    }
#pragma unroll
    for (int l = 0; l < kVectors; ++l) partial[(part * kVectors + l) * columns + column] = sums[l];
    __syncthreads();
    const int here = min(kVectors, directions - begin) * columns;
    for (int e = threadIdx.x; e < here; e += kColumnThreads) {
      double sum = 0;
      for (int p = 0; p < parts; ++p) sum += partial[p * kVectors * columns + e];
      projected[begin * columns + e] = sum;
    }
    __syncthreads();
  }
  return {tile, projected, vectors, columns, directions, operand.complement};
}

__global__ void __launch_bounds__(kColumnThreads) value_kernel(const __grid_constant__ List list) {
  SIMT_DYN_SHARED(double, shared);
  SIMT_SHARED(double, warp_sums, kColumnThreads / kWarp);
  SIMT_SHARED(unsigned, ticket, 1);
  const Operand& operand = find_operand(list);
  const unsigned block = blockIdx.x - operand.first_block, count = static_cast<unsigned>(chunks(operand));
  const unsigned index = block / count, chunk = block % count;
  const int m = static_cast<int>(operand.matrices.m), columns = operand.columns;
  double sum = 0;
  with_type(operand.type, [&](auto zero) {
    const auto projection =
        load_and_project<decltype(zero)>(operand, index, static_cast<int64_t>(chunk) * columns, shared);
    if (operand.complement) {
      for (int e = threadIdx.x; e < m * columns; e += kColumnThreads) {
        const double part = projection.tail_part(e / columns, e & (columns - 1));
        sum += part * part;
      }
    } else {
      for (int e = threadIdx.x; e < operand.directions * columns; e += kColumnThreads)
        sum += projection.projected[e] * projection.projected[e];
    }
  });
  sum = block_sum<kColumnThreads>(sum, warp_sums);
  double* sums = operand.sums + static_cast<int64_t>(index) * count;
  if (threadIdx.x == 0) {
    sums[chunk] = sum;
    ticket[0] = increment_acquire_release(operand.arrived + index, count - 1);
  }
  __syncthreads();
  if (ticket[0] != count - 1) return;  // the last to arrive goes on; which block that is makes no difference
  sum = 0;
  for (unsigned i = threadIdx.x; i < count; i += kColumnThreads) sum += sums[i];
  sum = block_sum<kColumnThreads>(sum, warp_sums);
  if (threadIdx.x != 0) return;
  if (!(sum <= DBL_MAX)) sum = std::numeric_limits<double>::quiet_NaN();
  if (operand.type == FloatType::kDouble) static_cast<double*>(operand.value)[index] = sum;
  else static_cast<float*>(operand.value)[index] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kColumnThreads) gradient_kernel(const __grid_constant__ List list) {
  SIMT_DYN_SHARED(double, shared);
  const Operand& operand = find_operand(list);
  const unsigned block = blockIdx.x - operand.first_block, count = static_cast<unsigned>(chunks(operand));
  const unsigned index = block / count;
  const int64_t first = static_cast<int64_t>(block % count) * operand.columns;
  const Matrices& shape = operand.gradients;
  const int m = static_cast<int>(shape.m), columns = operand.columns;
  with_type(operand.type, [&](auto zero) {
    using T = decltype(zero);
    const double factor = 2 * static_cast<double>(static_cast<const acc_t<T>*>(operand.value)[index]);
    const auto projection = load_and_project<T>(operand, index, first, shared);
    T* gradient = static_cast<T*>(operand.gradient) + index * shape.stride;
    const bool by_rows = shape.row_stride < shape.column_stride;
    for (int e = threadIdx.x; e < m * columns; e += kColumnThreads) {
      const int row = by_rows ? e % m : e / columns, column = by_rows ? e / m : e & (columns - 1);
      if (first + column >= shape.n) continue;
      gradient[row * shape.row_stride + (first + column) * shape.column_stride] =
          from_acc<T>(static_cast<acc_t<T>>(factor * projection.tail_part(row, column)));
    }
  });
}

}  // namespace talib_fast::spectral_tail
