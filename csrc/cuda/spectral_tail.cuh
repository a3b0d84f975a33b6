// The tail of a spectrum on the GPU: the k smallest squared singular values of matrices m × n, m <= n, their sum, and
// its gradient. Three launches for a whole list of tensors of matrices:
//
// gram_kernel:   blocks take tiles of the Gram matrices, in double, each over a slice of the columns.
// solve_kernel:  a block takes one Gram matrix into its shared memory, brings it into tridiagonal form, and finds the k
//                smallest eigenvalues, or the m - k largest, by bisection and their vectors by inverse iteration.
// value_kernel:  the value, from the matrix itself: that keeps the digits that squaring lost.
//
// gradient_kernel is the backward pass. All sums are taken in an order that depends on shapes and launch parameters
// only: equal input, equal bits.
#pragma once

#include "../types.h"
#include "runtime.cuh"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

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
  int directions;      // that the tail is known by,
  bool others;         // which span what is not the tail
  int slices;          // of the columns, in gram_kernel
  int spilled_rows;
  int columns;         // that a block of value_kernel or gradient_kernel takes, a power of two
  int scratch;         // doubles in shared memory for sums by warp, and for iterations if they fit
  unsigned first_block;
  FloatType type;
};

constexpr int kOperands = 12;
struct List {  // the parameters of one launch, which takes 4 KB
  Operand operands[kOperands];
  int count;
};
static_assert(sizeof(List) < 4000);

// ---- Sizes, for host and device

// upper triangles of tiles and of elements, by rows: [i, j] with i <= j of `size`
constexpr int triangle_start(int row, int size) { return row * size - row * (row - 1) / 2; }
constexpr int triangle_size(int size) { return size * (size + 1) / 2; }

// rows of a tile in memory: all of kTile, unless the matrix itself has fewer
constexpr int tile_side(int64_t m) { return m < kTile ? static_cast<int>(m) : kTile; }

// what the iteration for one vector needs, in doubles; odd, so that those of neighbouring threads are in other banks
constexpr int iteration_size(int m) { return (5 * m + (m + 7) / 8) | 1; }
constexpr int kSolverVectors = 9;  // of m doubles, that solve_kernel always has in shared memory
constexpr int64_t chunks(const Operand& operand) { return ceil_div(operand.matrices.n, operand.columns); }

// ---- Columns of a matrix in shared memory

// The element [row, column] goes to to[row * pitch + column], zero where the matrix has none, for a number of rows and
// a power of two of columns. Threads that follow each other read what lies together.
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

// ---- Gram matrices

__global__ void __launch_bounds__(kGramThreads) gram_kernel(const __grid_constant__ List list) {
  constexpr int kPitch = kPanel + 1, kSide = 16, kEach = kTile / kSide;  // a thread takes kEach × kEach elements
  static_assert(kSide * kSide == kGramThreads);
  SIMT_SHARED(double, ours, kTile * kPitch);
  SIMT_SHARED(double, theirs, kTile * kPitch);
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
  const double* others = row == column ? ours : theirs;
  double sums[kEach][kEach] = {};
  for (int64_t first = begin; first < end; first += kPanel) {
    with_type(operand.type, [&](auto zero) {
      using T = decltype(zero);
      const T* matrix = static_cast<const T*>(operand.input) + index * shape.stride;
      load_columns(matrix, shape, row * kTile, kTile, first, end, kPanel, ours, kPitch);
      if (row != column) load_columns(matrix, shape, column * kTile, kTile, first, end, kPanel, theirs, kPitch);
    });
    __syncthreads();
#pragma unroll 4
    for (int l = 0; l < kPanel; ++l) {
      double own[kEach], its[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) own[i] = ours[(y + i * kSide) * kPitch + l];
#pragma unroll
      for (int j = 0; j < kEach; ++j) its[j] = others[(x + j * kSide) * kPitch + l];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] += own[i] * its[j];
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

// ---- The smallest eigenvalues of a symmetric matrix of trace 1 or -1, and their vectors: one block

// The upper triangle of a matrix, by rows. kSpilled: the first ones are in global memory; those are done with first.
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
  double *diagonal, *beside, *squares;  // the tridiagonal form; beside[i] is that of rows i and i + 1
  double *tau;                          // of the reflectors, which stand in the triangle's rows
  double *product, *row_sums, *values;
  int* passed;                          // [3, m], of the bisection
  double* scratch;
  int m, k;

  __device__ __forceinline__ Solver(double* memory, int m, int k)
      : diagonal(memory), beside(memory + m), squares(memory + 2 * m), tau(memory + 3 * m), product(memory + 4 * m),
        row_sums(memory + 5 * m), values(memory + 6 * m), passed(reinterpret_cast<int*>(memory + 7 * m)),
        scratch(memory + kSolverVectors * m), m(m), k(k) {}
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

// Householder's reduction to tridiagonal form. Row j of the triangle then holds the reflector I - tau v v', v[j + 1] = 1.
// One sweep over the matrix brings it up to date with the reflector before and multiplies it by the next one; a lane has
// kColumns of each vector's elements in registers.
template <int kColumns, typename Triangle>
__device__ void tridiagonalize(const Triangle& a, const Solver& s) {
  constexpr int kRows = kColumns > 4 ? 2 : 4;  // that a warp takes at a time
  const int m = s.m, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  double v[kColumns] = {}, w[kColumns] = {}, alpha = 0;  // the update that is due: a -= v w' + w v'
  for (int j = 0; j < m; ++j) {
    const auto reflector = [&](int i) { return j == 0 ? 0 : a.at(j - 1, i); };
    const auto partner = [&](int i) { return j == 0 ? 0 : s.product[i] + alpha * reflector(i); };
    const double own = reflector(j), its = partner(j);
    const auto row = [&](int i) { return a.at(j, i) - own * partner(i) - its * reflector(i); };
    const double diagonal = row(j);
    if (j + 1 == m) {
      if (threadIdx.x == 0) s.diagonal[j] = diagonal;
      break;
    }
    double next[kColumns], rest = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int l = lane + c * kWarp;
      next[c] = l > j + 1 && l < m ? a.at(j, l) - own * w[c] - its * v[c] : 0;
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
        vs[r] = inside ? reflector(i) : 0;
        ws[r] = inside ? partner(i) : 0;
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
    if (threadIdx.x == 0) s.diagonal[j] = diagonal, s.beside[j] = reflected, s.tau[j] = tau;
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

// How many eigenvalues are below x: the changes of sign in the leading minors of the form less x. A minor that vanishes
// beside the one before is replaced by one that hardly does, and what gets small is scaled up.
__device__ __forceinline__ int count_below(const Solver& s, double x) {
  constexpr double kLeast = 0x1p-100, kSmall = 0x1p-300, kScale = 0x1p300;
  double before = 0, minor = 1;
  int count = 0;
  for (int i = 0; i < s.m; ++i) {
    double next = (s.diagonal[i] - x) * minor - s.squares[i] * before;
    if (fabs(next) < kLeast * fabs(minor)) next = -kLeast * minor;
    count += (next < 0) != (minor < 0);
    before = minor, minor = next;
    if (fabs(minor) < kSmall) before *= kScale, minor *= kScale;
  }
  return count;
}

// The k smallest eigenvalues, ascending: every round cuts each one's interval into as many parts as there are threads
// for it. The result is what no eigenvalue exceeds in magnitude, by Gershgorin's circles.
__device__ inline double smallest_eigenvalues(const Solver& s) {
  const int m = s.m, k = s.k, threads = blockDim.x, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < m; i += threads) s.squares[i] = i == 0 ? 0 : s.beside[i - 1] * s.beside[i - 1];
  double lowest = DBL_MAX, highest = -DBL_MAX;
  for (int i = lane; i < m; i += kWarp) {
    const double radius = (i == 0 ? 0 : fabs(s.beside[i - 1])) + (i + 1 == m ? 0 : fabs(s.beside[i]));
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
    int *counting = s.passed, *cleared = s.passed + m, *lagging = s.passed + 2 * m;
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

// Solves (form - value) x = b, with rows exchanged and vanishing pivots replaced: x grows along the eigenvectors. One
// thread's work, in its part of the iterations' memory.
struct Iteration {
  double *lower, *inverse_pivots, *upper, *second, *x;
  bool* swapped;
  int m;

  __device__ __forceinline__ Iteration(double* memory, int m)
      : lower(memory), inverse_pivots(memory + m), upper(memory + 2 * m), second(memory + 3 * m), x(memory + 4 * m),
        swapped(reinterpret_cast<bool*>(memory + 5 * m)), m(m) {}

  __device__ __forceinline__ static double inverse(double pivot) {
    constexpr double kLeast = 1e-18;
    return 1 / (fabs(pivot) < kLeast ? copysign(kLeast, pivot) : pivot);
  }

  __device__ __forceinline__ void factorize(const Solver& s, double value) const {
    double pivot = s.diagonal[0] - value, above = m > 1 ? s.beside[0] : 0;  // the row that eliminates, so far
    for (int i = 0; i + 1 < m; ++i) {
      const double below = s.beside[i], diagonal = s.diagonal[i + 1] - value, beside = i + 2 < m ? s.beside[i + 1] : 0;
      swapped[i] = fabs(pivot) < fabs(below);
      if (swapped[i]) {
        const double factor = pivot / below;
        inverse_pivots[i] = inverse(below), upper[i] = diagonal, second[i] = beside, lower[i] = factor;
        pivot = above - factor * diagonal, above = -factor * beside;
      } else {
        const double inverted = inverse(pivot), factor = below * inverted;
        inverse_pivots[i] = inverted, upper[i] = above, second[i] = 0, lower[i] = factor;
        pivot = diagonal - factor * above, above = beside;
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
  const auto vector = [&](int index) { return Iteration(memory + index * size, m).x; };
  for (int round = 0; round < kIterations; ++round) {
    for (int index = threadIdx.x; index < k; index += blockDim.x) {
      const Iteration iteration(memory + index * size, m);
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

// few enough for the registers that they need
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
  if (directions == 0) return;  // all of the matrix is its tail
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
      for (int slice = 0; slice < operand.slices; ++slice)
        sum += element[slice * slice_size];
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
  const double scale = operand.others ? -trace : trace;  // the largest are the smallest with the other sign
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

// ---- Value and gradient

// What a block needs in shared memory for its columns, in bytes.
constexpr int64_t column_bytes(int64_t m, int directions, int columns, int64_t element_bytes) {
  return (static_cast<int64_t>(directions) * columns + kColumnThreads * kVectors) *
             static_cast<int64_t>(sizeof(double)) +
         m * (columns + 1) * element_bytes;
}

// Columns of a matrix in shared memory, and what tells their part in the tail from the rest.
template <typename A>
struct Columns {
  const A* tile;            // [m, columns + 1]
  const double* projected;  // [directions, columns]
  const double* vectors;    // [m, directions]
  int columns, directions;
  bool others;

  __device__ __forceinline__ double tail_part(int row, int column) const {
    double sum = 0;
    for (int l = 0; l < directions; ++l) sum += vectors[row * directions + l] * projected[l * columns + column];
    return others ? static_cast<double>(tile[row * (columns + 1) + column]) - sum : sum;
  }
};

// Columns from the first one on, and their products with all vectors, for the whole block.
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
      for (int other = 0; other < parts; ++other) sum += partial[other * kVectors * columns + e];
      projected[begin * columns + e] = sum;
    }
    __syncthreads();
  }
  return {tile, projected, vectors, columns, directions, operand.others};
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
    const auto ours = load_and_project<decltype(zero)>(operand, index, static_cast<int64_t>(chunk) * columns, shared);
    if (operand.others) {
      for (int e = threadIdx.x; e < m * columns; e += kColumnThreads) {
        const double part = ours.tail_part(e / columns, e & (columns - 1));
        sum += part * part;
      }
    } else {
      for (int e = threadIdx.x; e < operand.directions * columns; e += kColumnThreads)
        sum += ours.projected[e] * ours.projected[e];
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
    const auto ours = load_and_project<T>(operand, index, first, shared);
    T* gradient = static_cast<T*>(operand.gradient) + index * shape.stride;
    const bool by_rows = shape.row_stride < shape.column_stride;
    for (int e = threadIdx.x; e < m * columns; e += kColumnThreads) {
      const int row = by_rows ? e % m : e / columns, column = by_rows ? e / m : e & (columns - 1);
      if (first + column >= shape.n) continue;
      gradient[row * shape.row_stride + (first + column) * shape.column_stride] =
          from_acc<T>(static_cast<acc_t<T>>(factor * ours.tail_part(row, column)));
    }
  });
}

// ---- Launch

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

// The one place that decides how the forward pass of an operand looks; `operands` is how many share the launches.
inline void plan_forward(Operand& operand, size_t operands, const Device& device, Workspace& workspace) {
  constexpr int64_t kLeastSlice = 2 * kPanel;
  const int64_t count = operand.matrices.count;
  const int m = static_cast<int>(operand.matrices.m), warps = solver_threads(operand, device) / kWarp;
  const int iterations = operand.directions * iteration_size(m);
  const int64_t pairs = triangle_size(static_cast<int>(ceil_div(m, kTile)));
  // a block for each multiprocessor, or more if the matrices are many
  operand.slices = static_cast<int>(
      std::min(ceil_div(operand.matrices.n, kLeastSlice),
               ceil_div(device.multiprocessors, pairs * count * static_cast<int64_t>(operands))));

  // the iterations after the sums by warp, in their place; then the triangle, whose first rows may spill
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

// f(list, blocks) for as many operands at a time as a launch takes
template <typename Blocks, typename F>
void in_lists(const std::vector<Operand>& operands, const Blocks& blocks, const F& f) {
  for (size_t first = 0; first < operands.size(); first += kOperands) {
    List list{};
    int64_t sum = 0;
    for (size_t i = first; i < std::min(operands.size(), first + kOperands); ++i) {
      list.operands[list.count] = operands[i];
      list.operands[list.count++].first_block = static_cast<unsigned>(sum);
      sum += blocks(operands[i]);
    }
    if (sum > std::numeric_limits<int>::max()) throw std::runtime_error("spectral_tail: too many matrices");
    if (sum > 0) f(list, static_cast<unsigned>(sum));
  }
}

inline void launch_solvers(const std::vector<Operand>& operands, const Device& device, cudaStream_t stream) {
  const auto launch = [&](auto columns, auto spilled) {
    std::vector<Operand> ours;
    int64_t bytes = 0;
    for (const Operand& operand : operands)
      if (solver_columns(operand) == columns() && (operand.spilled_rows != 0) == spilled())
        ours.push_back(operand), bytes = std::max(bytes, solver_bytes(operand));
    if (ours.empty()) return;
    constexpr int kColumns = columns();
    constexpr bool kSpilled = spilled();
    allow_shared_bytes(solve_kernel<kColumns, kSpilled>, bytes, device);
    in_lists(ours, [](const Operand& operand) { return operand.matrices.count; },
             [&](const List& list, unsigned blocks) {
               SIMT_LAUNCH((solve_kernel<kColumns, kSpilled>), dim3(blocks), dim3(solver_threads(ours[0], device)),
                           bytes, stream, list);
             });
  };
  const auto launch_both = [&](auto columns) { launch(columns, std::false_type{}), launch(columns, std::true_type{}); };
  launch_both(std::integral_constant<int, 2>{});
  launch_both(std::integral_constant<int, 4>{});
  launch_both(std::integral_constant<int, 8>{});
}

// f(list, blocks, bytes of shared memory) for launches of value_kernel or gradient_kernel
template <typename F>
void over_columns(const std::vector<Operand>& operands, const F& f) {
  in_lists(operands, [](const Operand& operand) { return operand.matrices.count * chunks(operand); },
           [&](const List& list, unsigned blocks) {
             int64_t bytes = 0;
             for (int i = 0; i < list.count; ++i) {
               const Operand& operand = list.operands[i];
               const int64_t element_bytes = operand.type == FloatType::kDouble ? sizeof(double) : sizeof(float);
               bytes = std::max(
                   bytes, column_bytes(operand.matrices.m, operand.directions, operand.columns, element_bytes));
             }
             f(list, blocks, bytes);
           });
}

inline void launch_forward(const std::vector<Operand>& operands, const Device& device, cudaStream_t stream) {
  in_lists(operands,
           [](const Operand& operand) -> int64_t {
             const int pairs = triangle_size(static_cast<int>(ceil_div(operand.matrices.m, kTile)));
             return operand.directions == 0 ? 0 : operand.matrices.count * operand.slices * pairs;
           },
           [&](const List& list, unsigned blocks) {
             SIMT_LAUNCH(gram_kernel, dim3(blocks), dim3(kGramThreads), 0, stream, list);
           });
  launch_solvers(operands, device, stream);
  over_columns(operands, [&](const List& list, unsigned blocks, int64_t bytes) {
    SIMT_LAUNCH(value_kernel, dim3(blocks), dim3(kColumnThreads), bytes, stream, list);
  });
}

inline void launch_backward(const std::vector<Operand>& operands, cudaStream_t stream) {
  over_columns(operands, [&](const List& list, unsigned blocks, int64_t bytes) {
    SIMT_LAUNCH(gradient_kernel, dim3(blocks), dim3(kColumnThreads), bytes, stream, list);
  });
}

}  // namespace talib_fast::spectral_tail
