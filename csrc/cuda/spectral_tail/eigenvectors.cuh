// The smallest eigenvalues of the tridiagonal form, by bisection, and their vectors, by inverse iteration.
#pragma once

#include "tridiagonal.cuh"

#include <cfloat>
#include <cstdint>

namespace talib_fast::spectral_tail {

// How many eigenvalues are below x: the changes of sign in the leading minors of the form minus x. A minor that
// vanishes beside the previous one is replaced by a tiny one, and small minors are scaled up.
__device__ __forceinline__ int count_below(const Solver& s, double x) {
  constexpr double kLeast = 0x1p-100, kSmall = 0x1p-300, kScale = 0x1p300;
  double previous = 0, minor = 1;
  int count = 0;
  for (int i = 0; i < s.m; ++i) {
    double next = (s.diagonal[i] - x) * minor - s.squares[i] * previous;
    if (fabs(next) < kLeast * fabs(minor)) next = -kLeast * minor;
    count += (next < 0) != (minor < 0);
    previous = minor, minor = next;
    if (fabs(minor) < kSmall) previous *= kScale, minor *= kScale;
  }
  return count;
}

// Finds the k smallest eigenvalues, ascending. In every round each eigenvalue's threads try one number each in its
// interval. Returns what no eigenvalue exceeds in magnitude, by Gershgorin's circles.
__device__ inline double smallest_eigenvalues(const Solver& s) {
  const int m = s.m, k = s.k, threads = blockDim.x, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < m; i += threads)
    s.squares[i] = i == 0 ? 0 : s.off_diagonal[i - 1] * s.off_diagonal[i - 1];
  double lowest = DBL_MAX, highest = -DBL_MAX;
  for (int i = lane; i < m; i += kWarp) {
    const double radius = (i == 0 ? 0 : fabs(s.off_diagonal[i - 1])) + (i + 1 == m ? 0 : fabs(s.off_diagonal[i]));
    lowest = fmin(lowest, s.diagonal[i] - radius), highest = fmax(highest, s.diagonal[i] + radius);
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    lowest = fmin(lowest, __shfl_xor_sync(0xffffffffu, lowest, distance));
    highest = fmax(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
  }
  const double bound = fmax(fabs(lowest), fabs(highest)), precision = DBL_EPSILON * bound;
  lowest -= 2 * precision * m, highest += 2 * precision * m;

  const int parts = max(1, threads / k), group = min(k, threads);
  const int own = static_cast<int>(threadIdx.x) / parts, probe = threadIdx.x % parts;
  for (int begin = 0; begin < k; begin += group) {
    const int wanted = begin + own;
    const bool busy = own < group && wanted < k;
    double low = lowest, high = highest;
    // counters of three rounds: one is cleared while one counts, and threads that lag behind read the third
    int *counting = s.counts, *cleared = s.counts + m, *lagging = s.counts + 2 * m;
    for (int i = threadIdx.x; i < m; i += threads) counting[i] = 0;
    __syncthreads();
    for (double width = highest - lowest; width > precision; width /= parts + 1) {
      const auto at = [&](int part) { return low + (high - low) * part / (parts + 1); };
      for (int i = threadIdx.x; i < m; i += threads) cleared[i] = 0;
      if (busy && count_below(s, at(probe + 1)) <= wanted) atomicAdd(counting + own, 1);
      __syncthreads();
      const int below = busy ? counting[own] : 0;
      const double from = at(below), to = below == parts ? high : at(below + 1);
      low = from, high = to;
      int* const next = cleared;
      cleared = lagging, lagging = counting, counting = next;
    }
    if (busy && probe == 0) s.values[wanted] = (low + high) / 2;
    __syncthreads();
  }
  return bound;
}

// Solves (tridiagonal form - value) x = b, with rows exchanged and vanishing pivots replaced: x grows along the
// eigenvectors. One thread's work, in its part of the iterations' memory.
struct InverseIteration {
  double *lower, *inverse_pivots, *upper, *second, *x;
  bool* swapped;
  int m;

  __device__ __forceinline__ InverseIteration(double* memory, int m)
      : lower(memory),
        inverse_pivots(memory + m),
        upper(memory + 2 * m),
        second(memory + 3 * m),
        x(memory + 4 * m),
        swapped(reinterpret_cast<bool*>(memory + 5 * m)),
        m(m) {}

  __device__ __forceinline__ static double inverse(double pivot) {
    constexpr double kLeast = 1e-18;
    return 1 / (fabs(pivot) < kLeast ? copysign(kLeast, pivot) : pivot);
  }

  __device__ __forceinline__ void factorize(const Solver& s, double value) const {
    double pivot = s.diagonal[0] - value, above = m > 1 ? s.off_diagonal[0] : 0;  // the row that eliminates, so far
    for (int i = 0; i + 1 < m; ++i) {
      const double below = s.off_diagonal[i], diagonal = s.diagonal[i + 1] - value;
      const double next_above = i + 2 < m ? s.off_diagonal[i + 1] : 0;
      swapped[i] = fabs(pivot) < fabs(below);
      if (swapped[i]) {
        const double factor = pivot / below;
        inverse_pivots[i] = inverse(below), upper[i] = diagonal, second[i] = next_above, lower[i] = factor;
        pivot = above - factor * diagonal, above = -factor * next_above;
      } else {
        const double inverted = inverse(pivot), factor = below * inverted;
        inverse_pivots[i] = inverted, upper[i] = above, second[i] = 0, lower[i] = factor;
        pivot = diagonal - factor * above, above = next_above;
      }
    }
    inverse_pivots[m - 1] = inverse(pivot);
  }

  __device__ __forceinline__ void solve() const {
    double carried = x[0];
    for (int i = 0; i + 1 < m; ++i) {
      const double next = x[i + 1], top = swapped[i] ? next : carried, rest = swapped[i] ? carried : next;
      x[i] = top;
      carried = rest - lower[i] * top;
    }
    double after = 0, second_after = 0;
    for (int i = m - 1; i >= 0; --i) {
      const double here = i + 1 == m ? carried : x[i] - upper[i] * after - second[i] * second_after;
      second_after = after, after = here * inverse_pivots[i];
      x[i] = after;
    }
  }

  // an arbitrary vector, another one for every index
  __device__ __forceinline__ void start(int index) const {
    for (int i = 0; i < m; ++i) {
      uint64_t bits = 0x9e3779b97f4a7c15u * static_cast<uint64_t>(index * m + i + 1);
      bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
      bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
      x[i] = static_cast<double>((bits ^ bits >> 31) >> 11) * 0x1p-52 - 1;
    }
  }
};

// A vector of length 1 out of x; a warp's work.
__device__ __forceinline__ void normalize(double* x, int m) {
  double norm = 0;
  for (int i = threadIdx.x % kWarp; i < m; i += kWarp) norm += x[i] * x[i];
  const double scale = 1 / sqrt(warp_sum(norm));
  for (int i = threadIdx.x % kWarp; i < m; i += kWarp) x[i] *= scale;
}

// Orthonormal eigenvectors of the tridiagonal form for the values found, one after the other in the iterations' memory;
// those of a cluster span its space.
__device__ inline void eigenvectors(const Solver& s, double bound, double* memory) {
  constexpr int kIterations = 3;
  const double near = 1e-3 * bound;
  const int m = s.m, k = s.k, size = iteration_size(m), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto vector = [&](int index) { return InverseIteration(memory + index * size, m).x; };
  for (int round = 0; round < kIterations; ++round) {
    for (int index = threadIdx.x; index < k; index += blockDim.x) {
      const InverseIteration iteration(memory + index * size, m);
      if (round == 0) iteration.factorize(s, s.values[index]), iteration.start(index);
      iteration.solve();
    }
    __syncthreads();
    for (int index = warp; index < k; index += warps) normalize(vector(index), m);
    __syncthreads();
    int cluster = 0;
    for (int index = 1; index < k; ++index) {
      if (s.values[index] - s.values[index - 1] > near) cluster = index;
      if (cluster == index) continue;
      double* x = vector(index);
      for (int pass = 0; pass < 2; ++pass) {
        double* along = s.product;
        for (int other = cluster + warp; other < index; other += warps) {
          double dot = 0;
          for (int i = threadIdx.x % kWarp; i < m; i += kWarp) dot += x[i] * vector(other)[i];
          dot = warp_sum(dot);
          if (threadIdx.x % kWarp == 0) along[other] = dot;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < m; i += blockDim.x)
          for (int other = cluster; other < index; ++other) x[i] -= along[other] * vector(other)[i];
        __syncthreads();
        if (warp == 0) normalize(x, m);
        __syncthreads();
      }
    }
  }
}

// The eigenvectors of the matrix itself, [m, k]: the reflectors, last first, a warp for each vector.
template <int kColumns, typename Triangle>
__device__ void reflect_back(const Triangle& a, const Solver& s, const double* memory, double* vectors) {
  const int m = s.m, lane = threadIdx.x % kWarp;
  for (int index = threadIdx.x / kWarp; index < s.k; index += blockDim.x / kWarp) {
    const double* from = memory + index * iteration_size(m) + 4 * m;
    double x[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[c] = lane + c * kWarp < m ? from[lane + c * kWarp] : 0;
    for (int j = m - 3; j >= 0; --j) {
      double v[kColumns], dot = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int l = lane + c * kWarp;
        v[c] = l > j && l < m ? a.at(j, l) : 0;
        dot += v[c] * x[c];
      }
      dot = s.tau[j] * warp_sum(dot);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) x[c] -= dot * v[c];
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (lane + c * kWarp < m) vectors[(lane + c * kWarp) * s.k + index] = x[c];
  }
}

}  // namespace talib_fast::spectral_tail
