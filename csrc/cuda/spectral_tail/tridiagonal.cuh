// A symmetric matrix of trace 1 or -1 in a block's shared memory, and its tridiagonal form.
#pragma once

#include "operand.cuh"

namespace talib_fast::spectral_tail {

// The upper triangle of a matrix, by rows. With kSpilled the first rows are in global memory: they are done with first.
template <bool kSpilled>
struct Triangle {
  double *spilled, *shared;
  int m, spilled_rows;

  __device__ __forceinline__ double& at(int i, int j) const {
    const int element = triangle_start(i, m) + j - i;
    if constexpr (kSpilled) {
      if (i < spilled_rows) return spilled[element];
      return shared[element - triangle_start(spilled_rows, m)];
    } else {
      return shared[element];
    }
  }
};

// What the block has in shared memory beside the triangle, [m] each, and what follows from them.
struct Solver {
  double *diagonal, *off_diagonal, *squares;  // the tridiagonal form; off_diagonal[i] is that of rows i and i + 1
  double* tau;                                // of the reflectors, which stand in the triangle's rows
  double *product, *row_sums, *values;
  int* counts;  // [3, m], of the bisection
  double* scratch;
  int m, k;

  __device__ __forceinline__ Solver(double* memory, int m, int k)
      : diagonal(memory),
        off_diagonal(memory + m),
        squares(memory + 2 * m),
        tau(memory + 3 * m),
        product(memory + 4 * m),
        row_sums(memory + 5 * m),
        values(memory + 6 * m),
        counts(reinterpret_cast<int*>(memory + 7 * m)),
        scratch(memory + kSolverVectors * m),
        m(m),
        k(k) {}
};

// The sum over the lanes of each values[r], in the lanes r * (kWarp / R) to (r + 1) * (kWarp / R) - 1.
template <int R>
__device__ __forceinline__ double sum_of_each(double (&values)[R]) {
  int distance = kWarp / 2;
#pragma unroll
  for (int half = R / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const double given = upper ? values[r] : values[r + half], kept = upper ? values[r + half] : values[r];
      values[r] = kept + __shfl_xor_sync(0xffffffffu, given, distance);
    }
  }
  double sum = values[0];
  for (; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

// Householder's reduction to tridiagonal form. Row j of the triangle then holds the reflector I - tau v v' with v[j +
// 1] = 1. One sweep over the matrix applies the last reflector and multiplies by the next one. A lane has kColumns of
// each vector's elements in registers.
template <int kColumns, typename Triangle>
__device__ void tridiagonalize(const Triangle& a, const Solver& s) {
  constexpr int kRows = kColumns > 4 ? 2 : 4;  // that a warp takes at a time
  const int m = s.m, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  double v[kColumns] = {}, w[kColumns] = {}, alpha = 0;  // the update that is due: a -= v w' + w v'
  for (int j = 0; j < m; ++j) {
    const auto v_at = [&](int i) { return j == 0 ? 0 : a.at(j - 1, i); };
    const auto w_at = [&](int i) { return j == 0 ? 0 : s.product[i] + alpha * v_at(i); };
    const double v_j = v_at(j), w_j = w_at(j);
    const auto row = [&](int i) { return a.at(j, i) - v_j * w_at(i) - w_j * v_at(i); };
    const double diagonal = row(j);
    if (j + 1 == m) {
      if (threadIdx.x == 0) s.diagonal[j] = diagonal;
      break;
    }
    double next[kColumns], rest = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int l = lane + c * kWarp;
      next[c] = l > j + 1 && l < m ? a.at(j, l) - v_j * w[c] - w_j * v[c] : 0;
      rest += next[c] * next[c];
    }
    rest = warp_sum(rest);
    const double first = row(j + 1);
    const double reflected = rest == 0 ? first : -copysign(sqrt(first * first + rest), first);
    const double tau = rest == 0 ? 0 : (reflected - first) / reflected, scale = rest == 0 ? 0 : 1 / (first - reflected);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) next[c] = lane + c * kWarp == j + 1 ? 1 : next[c] * scale;

    double sums[kColumns] = {};
    for (int begin = ((j + 1) / kRows + warp) * kRows; begin < m; begin += warps * kRows) {
      double vs[kRows], ws[kRows], nexts[kRows], dots[kRows] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = begin + r;
        const bool inside = i > j && i < m;
        vs[r] = inside ? v_at(i) : 0;
        ws[r] = inside ? w_at(i) : 0;
        nexts[r] = !inside ? 0 : i == j + 1 ? 1 : row(i) * scale;
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if ((c + 1) * kWarp <= begin) continue;
        const int l = lane + c * kWarp;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int i = begin + r;
          if (i <= j || l < i || l >= m) continue;
          const double element = a.at(i, l) - vs[r] * w[c] - ws[r] * v[c];
          a.at(i, l) = element;
          dots[r] += element * next[c];
          if (l > i) sums[c] += element * nexts[r];
        }
      }
      const double dot = sum_of_each(dots);
      const int i = begin + lane / (kWarp / kRows);
      if (lane % (kWarp / kRows) == 0 && i < m) s.row_sums[i] = dot;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int l = lane + c * kWarp;
      if (l > j && l < m) s.scratch[warp * m + l] = sums[c];
    }
    __syncthreads();

    for (int i = j + 1 + threadIdx.x; i < m; i += blockDim.x) {
      double sum = s.row_sums[i];
      for (int other = 0; other < warps; ++other) sum += s.scratch[other * m + i];
      s.product[i] = tau * sum;
    }
    if (warp == 0) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int l = lane + c * kWarp;
        if (l > j && l < m) a.at(j, l) = next[c];
      }
    }
    if (threadIdx.x == 0) s.diagonal[j] = diagonal, s.off_diagonal[j] = reflected, s.tau[j] = tau;
    __syncthreads();

    double dot = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int l = lane + c * kWarp;
      v[c] = next[c], w[c] = l > j && l < m ? s.product[l] : 0;
      dot += v[c] * w[c];
    }
    alpha = -0.5 * tau * warp_sum(dot);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) w[c] += alpha * v[c];
  }
  __syncthreads();
}

}  // namespace talib_fast::spectral_tail
