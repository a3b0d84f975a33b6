#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "../spectral_tail.h"
#include "simd.h"
#include "tasks.h"

namespace talib_fast {
namespace {

typedef Lanes<double>::type Doubles;
constexpr int64_t kDoubles = 8, kTile = 4;

INLINE double sum_of(const Doubles& lanes) {
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
#else  // GCC 11
typedef int64_t Lane __attribute__((vector_size(64)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lane{__VA_ARGS__})
#endif

// The sums of eight vectors at once, each in the lane of its number.
INLINE Doubles sums_of(const Doubles* v) {
  Doubles pairs[4], fours[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    pairs[i] = SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               SHUFFLE(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    fours[i] = SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// ---- Vectors of doubles, of any length.

INLINE double dot(const double* a, const double* b, int64_t n) {
  Doubles sums = {};
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) sums += load_lanes(a + i) * load_lanes(b + i);
  double rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_of(sums) + rest;
}

INLINE void add_multiple(double* to, double factor, const double* of, int64_t n) {
  int64_t i = 0;
  const Doubles factors = Doubles{} + factor;
  for (; i + kDoubles <= n; i += kDoubles) store_lanes(to + i, load_lanes(to + i) + factors * load_lanes(of + i));
  for (; i < n; ++i) to[i] += factor * of[i];
}

// to[i] += a * p[i] + b * q[i]
INLINE void add_two_multiples(double* to, double a, const double* p, double b, const double* q, int64_t n) {
  int64_t i = 0;
  const Doubles as = Doubles{} + a, bs = Doubles{} + b;
  for (; i + kDoubles <= n; i += kDoubles)
    store_lanes(to + i, load_lanes(to + i) + as * load_lanes(p + i) + bs * load_lanes(q + i));
  for (; i < n; ++i) to[i] += a * p[i] + b * q[i];
}

// to[i] += factor * row[i]; returns the dot product of row and v.
INLINE double add_multiple_and_dot(double* to, double factor, const double* row, const double* v, int64_t n) {
  Doubles sums = {};
  int64_t i = 0;
  const Doubles factors = Doubles{} + factor;
  for (; i + kDoubles <= n; i += kDoubles) {
    const Doubles own = load_lanes(row + i);
    sums += own * load_lanes(v + i);
    store_lanes(to + i, load_lanes(to + i) + factors * own);
  }
  double rest = 0;
  for (; i < n; ++i) rest += row[i] * v[i], to[i] += factor * row[i];
  return sum_of(sums) + rest;
}

// ---- One matrix [m, n], m <= n, of any strides.

template <typename T>
struct Matrix {
  T* data;
  int64_t m, n, row, column;  // the last two: strides
};

// Columns [begin, end) in double, [m, stride], with zeros behind a row's last up to a whole vector.
template <typename T>
SIMD_CLONES void pack(const Matrix<const T>& from, int64_t begin, int64_t end, double* to, int64_t stride) {
  const int64_t n = end - begin;
  for (int64_t i = 0; i < from.m; ++i) {
    const T* row = from.data + i * from.row + begin * from.column;
    double* out = to + i * stride;
    if (from.column == 1)
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(static_cast<acc_t<T>>(row[j]));
    else
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(static_cast<acc_t<T>>(row[j * from.column]));
    for (int64_t j = n; j < round_up(n, kDoubles); ++j) out[j] = 0;
  }
}

template <typename T>
SIMD_CLONES void unpack(const double* from, int64_t width, int64_t begin, int64_t end, const Matrix<T>& to) {
  for (int64_t i = 0; i < to.m; ++i) {
    T* row = to.data + i * to.row + begin * to.column;
    for (int64_t j = 0; j < end - begin; ++j)
      row[j * to.column] = static_cast<T>(static_cast<acc_t<T>>(from[i * width + j]));
  }
}

// Adds the columns' Gram matrix to the upper triangle of `gram`, [size, size]. `columns`: [size, stride], `width` of
// them; size and width are multiples of a tile and of a vector.
SIMD_CLONES void add_gram(const double* columns, int64_t stride, int64_t width, double* gram, int64_t size) {
  for (int64_t row = 0; row < size; row += kTile)
    for (int64_t column = row; column < size; column += kTile) {
      const double *a = columns + row * stride, *b = columns + column * stride;
      Doubles sums[kTile * kTile] = {};
      for (int64_t l = 0; l < width; l += kDoubles) {
        Doubles its[kTile];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTile; ++j) its[j] = load_lanes(b + j * stride + l);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kTile; ++i) {
          const Doubles own = load_lanes(a + i * stride + l);
#pragma GCC unroll 4
          for (int64_t j = 0; j < kTile; ++j) sums[i * kTile + j] += own * its[j];
        }
      }
      for (int64_t half = 0; half < 2; ++half) {
        const Doubles added = sums_of(sums + half * kDoubles);
        for (int64_t lane = 0; lane < kDoubles; ++lane)
          gram[(row + half * 2 + lane / kTile) * size + column + lane % kTile] += added[lane];
      }
    }
}

// A matrix's columns in pieces that threads share. How many does not depend on the threads, so that sums don't either.
struct Pieces {
  explicit Pieces(int64_t columns) : n(columns), count(std::min<int64_t>(kMost, ceil_div(n, kColumns))) {}

  // f(columns in double, stride, width) for one piece after the other of those that fit a core's cache
  template <typename T, typename F>
  void for_each_panel(int64_t piece, const Matrix<const T>& matrix, const F& f) const {
    const int64_t size = round_up(matrix.m, kTile), share = round_up(ceil_div(n, count), kDoubles);
    const int64_t stride = std::max<int64_t>(64, std::min(share, kOwnCache / 2 / (size * 8) / kDoubles * kDoubles));
    const std::unique_ptr<double[]> columns(new double[size * stride]);
    std::fill(columns.get() + matrix.m * stride, columns.get() + size * stride, 0.0);
    const int64_t last = std::min(n, (piece + 1) * share);
    for (int64_t begin = piece * share; begin < last; begin += stride) {
      const int64_t end = std::min(last, begin + stride);
      pack(matrix, begin, end, columns.get(), stride);
      f(columns.get(), stride, round_up(end - begin, kDoubles));
    }
  }

  static constexpr int64_t kMost = 16, kColumns = 256;
  int64_t n, count;
};

// ---- The smallest eigenvalues of a symmetric matrix of trace 1 or -1, and their vectors.

struct Tridiagonal {
  std::vector<double> diagonal, beside;  // m and m - 1

  // bounds of the eigenvalues, by Gershgorin's circles
  std::pair<double, double> bounds() const {
    double lowest = diagonal[0], highest = diagonal[0];
    const int64_t m = diagonal.size();
    for (int64_t i = 0; i < m; ++i) {
      const double radius = (i == 0 ? 0 : std::abs(beside[i - 1])) + (i + 1 == m ? 0 : std::abs(beside[i]));
      lowest = std::min(lowest, diagonal[i] - radius);
      highest = std::max(highest, diagonal[i] + radius);
    }
    return {lowest, highest};
  }
};

// Householder's reduction of the upper triangle of `a`, [m, m] with rows of `stride`, which then holds the reflectors:
// I - tau v v' with v = (1, a[j, j + 2:]) from j + 1 on.
SIMD_CLONES Tridiagonal tridiagonalize(double* a, int64_t m, int64_t stride, double* tau) {
  Tridiagonal t{std::vector<double>(m), std::vector<double>(std::max<int64_t>(m - 1, 0))};
  std::vector<double> product(m);
  for (int64_t j = 0; j < m; ++j) {
    t.diagonal[j] = a[j * stride + j];
    if (j + 1 == m) break;
    double* v = a + j * stride + j + 1;
    const int64_t n = m - j - 1;
    const double first = v[0], rest = dot(v + 1, v + 1, n - 1);
    t.beside[j] = first;
    tau[j] = 0;
    if (rest == 0) continue;
    const double reflected = -std::copysign(std::sqrt(first * first + rest), first);
    t.beside[j] = reflected;
    tau[j] = (reflected - first) / reflected;
    for (int64_t i = 1; i < n; ++i) v[i] /= first - reflected;
    v[0] = 1;
    double* p = product.data();
    std::fill_n(p, n, 0.0);
    for (int64_t i = 0; i < n; ++i) {  // the rest of the matrix times v
      const double* row = a + (j + 1 + i) * stride + j + 1;
      p[i] += row[i] * v[i] + add_multiple_and_dot(p + i + 1, v[i], row + i + 1, v + i + 1, n - i - 1);
    }
    for (int64_t i = 0; i < n; ++i) p[i] *= tau[j];
    add_multiple(p, -0.5 * tau[j] * dot(p, v, n), v, n);
    for (int64_t i = 0; i < n; ++i) {
      double* row = a + (j + 1 + i) * stride + j + 1;
      add_two_multiples(row + i, -v[i], p + i, -p[i], v + i, n - i);
    }
  }
  return t;
}

// How many eigenvalues are below each of kProbes numbers: the negative pivots of t - number.
constexpr int64_t kProbes = 2 * kDoubles;
INLINE void count_below(const Tridiagonal& t, const double* squares, const double* numbers, int64_t* counts) {
  constexpr double kPivot = std::numeric_limits<double>::min();
  typedef decltype(Doubles{} < Doubles{}) Integers;
  Doubles at[2], q[2];
  Integers below[2] = {};
  for (int64_t half = 0; half < 2; ++half) at[half] = load_lanes(numbers + half * kDoubles), q[half] = Doubles{} + 1.0;
  const int64_t m = t.diagonal.size();
  for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 2
    for (int64_t half = 0; half < 2; ++half) {  // two chains of divisions take hardly longer than one
      q[half] = t.diagonal[i] - at[half] - squares[i] / q[half];
      q[half] = ((q[half] < kPivot) & (q[half] > -kPivot)) ? Doubles{} - kPivot : q[half];
      below[half] += q[half] < 0.0;
    }
  for (int64_t probe = 0; probe < kProbes; ++probe) counts[probe] = -below[probe / kDoubles][probe % kDoubles];
}

// The k smallest eigenvalues, ascending, by bisection, or into more parts at a time: the probes are shared out among up
// to as many eigenvalues.
SIMD_CLONES std::vector<double> smallest_eigenvalues(const Tridiagonal& t, int64_t k) {
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  constexpr int kRounds = 64;
  const int64_t m = t.diagonal.size();
  std::vector<double> squares(m), found(k);
  for (int64_t i = 1; i < m; ++i) squares[i] = t.beside[i - 1] * t.beside[i - 1];
  auto [lowest, highest] = t.bounds();
  const double precision = kEpsilon * std::max(std::abs(lowest), std::abs(highest));
  lowest -= 2 * precision * m, highest += 2 * precision * m;
  for (int64_t begin = 0, group; begin < k; begin += group) {
    for (group = kProbes; group > k - begin;) group /= 2;
    const int64_t parts = kProbes / group;
    double low[kProbes], high[kProbes], widest = highest - lowest;
    std::fill_n(low, group, lowest), std::fill_n(high, group, highest);
    for (int round = 0; round < kRounds && widest > precision; ++round) {
      double numbers[kProbes];
      int64_t counts[kProbes];
      for (int64_t probe = 0; probe < kProbes; ++probe) {
        const int64_t own = probe / parts;
        numbers[probe] = low[own] + (high[own] - low[own]) * (probe % parts + 1) / (parts + 1);
      }
      count_below(t, squares.data(), numbers, counts);
      for (int64_t probe = 0; probe < kProbes; ++probe) {
        const int64_t own = probe / parts;
        if (counts[probe] > begin + own) high[own] = std::min(high[own], numbers[probe]);
        else low[own] = std::max(low[own], numbers[probe]);
      }
      widest = 0;
      for (int64_t own = 0; own < group; ++own) widest = std::max(widest, high[own] - low[own]);
    }
    for (int64_t own = 0; own < group; ++own) found[begin + own] = (low[own] + high[own]) / 2;
  }
  return found;
}

// Solves (t - value) x = b in place, with rows exchanged and vanishing pivots replaced: x grows along the eigenvectors.
class ShiftedSolver {
 public:
  ShiftedSolver(const Tridiagonal& t, double value)
      : lower_(t.beside), pivots_(t.diagonal), upper_(t.beside), second_(t.diagonal.size()), swapped_(lower_.size()) {
    for (double& pivot : pivots_) pivot -= value;
    const int64_t m = pivots_.size();
    for (int64_t i = 0; i + 1 < m; ++i) {
      swapped_[i] = std::abs(pivots_[i]) < std::abs(lower_[i]);
      if (swapped_[i]) {
        const double factor = pivots_[i] / lower_[i], diagonal = pivots_[i + 1];
        pivots_[i] = lower_[i];
        keep_away_from_zero(pivots_[i]);
        lower_[i] = factor;
        pivots_[i + 1] = upper_[i] - factor * diagonal;
        upper_[i] = diagonal;
        if (i + 2 < m) second_[i] = upper_[i + 1], upper_[i + 1] *= -factor;
      } else {
        keep_away_from_zero(pivots_[i]);
        lower_[i] /= pivots_[i];
        pivots_[i + 1] -= lower_[i] * upper_[i];
      }
    }
    keep_away_from_zero(pivots_[m - 1]);
  }

  void solve(double* x) const {
    const int64_t m = pivots_.size();
    for (int64_t i = 0; i + 1 < m; ++i) {
      if (swapped_[i]) std::swap(x[i], x[i + 1]);
      x[i + 1] -= lower_[i] * x[i];
    }
    for (int64_t i = m - 1; i >= 0; --i) {
      if (i + 1 < m) x[i] -= upper_[i] * x[i + 1];
      if (i + 2 < m) x[i] -= second_[i] * x[i + 2];
      x[i] /= pivots_[i];
    }
  }

 private:
  static void keep_away_from_zero(double& pivot) {
    constexpr double kLeast = 1e-18;
    if (std::abs(pivot) < kLeast) pivot = std::copysign(kLeast, pivot);
  }

  std::vector<double> lower_, pivots_, upper_, second_;
  std::vector<char> swapped_;
};

// Orthonormal eigenvectors for those eigenvalues, [k, m], by inverse iteration; those of a cluster span its space.
SIMD_CLONES void eigenvectors(const Tridiagonal& t, const std::vector<double>& values, double* vectors) {
  constexpr int kIterations = 3;
  const auto [lowest, highest] = t.bounds();
  const double near = 1e-3 * std::max(std::abs(lowest), std::abs(highest));
  const int64_t m = t.diagonal.size(), k = values.size();
  uint64_t state = 0x9e3779b97f4a7c15;
  int64_t cluster = 0;
  for (int64_t index = 0; index < k; ++index) {
    if (index > 0 && values[index] - values[index - 1] > near) cluster = index;
    const ShiftedSolver solver(t, values[index]);
    double* x = vectors + index * m;
    for (int64_t i = 0; i < m; ++i) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      x[i] = static_cast<double>(state >> 11) * 0x1p-52 - 1;
    }
    for (int iteration = 0; iteration < kIterations; ++iteration) {
      solver.solve(x);
      for (int pass = 0; pass < 2; ++pass) {
        const double scale = 1 / std::sqrt(dot(x, x, m));
        for (int64_t i = 0; i < m; ++i) x[i] *= scale;
        for (int64_t other = cluster; other < index; ++other)
          add_multiple(x, -dot(x, vectors + other * m, m), vectors + other * m, m);
      }
      const double scale = 1 / std::sqrt(dot(x, x, m));
      for (int64_t i = 0; i < m; ++i) x[i] *= scale;
    }
  }
}

SIMD_CLONES void reflect_back(const double* a, int64_t m, int64_t stride, const double* tau, int64_t k,
                              double* vectors) {
  for (int64_t index = 0; index < k; ++index)
    for (int64_t j = m - 3; j >= 0; --j) {
      const double* v = a + j * stride + j + 1;
      double* x = vectors + index * m + j + 1;
      if (tau[j] != 0) add_multiple(x, -tau[j] * dot(v, x, m - j - 1), v, m - j - 1);
    }
}

// to[k, width] = vectors[k, m] times columns[m, stride]
SIMD_CLONES void project(const double* vectors, int64_t k, int64_t m, const double* columns, int64_t stride,
                         int64_t width, double* to) {
  constexpr int64_t kBlock = 4 * kDoubles;
  int64_t begin = 0;
  for (; begin + kBlock <= width; begin += kBlock)
    for (int64_t index = 0; index < k; ++index) {
      Doubles sums[4] = {};
      for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 4
        for (int64_t part = 0; part < 4; ++part)
          sums[part] += vectors[index * m + i] * load_lanes(columns + i * stride + begin + part * kDoubles);
      for (int64_t part = 0; part < 4; ++part) store_lanes(to + index * width + begin + part * kDoubles, sums[part]);
    }
  for (; begin < width; begin += kDoubles)
    for (int64_t index = 0; index < k; ++index) {
      Doubles sum = {};
      for (int64_t i = 0; i < m; ++i) sum += vectors[index * m + i] * load_lanes(columns + i * stride + begin);
      store_lanes(to + index * width + begin, sum);
    }
}

SIMD_CLONES double squared_norm(const double* values, int64_t n) { return dot(values, values, n); }

SIMD_CLONES void subtract_product(const double* rows, int64_t m, int64_t k, const double* columns, int64_t width,
                                  double* from, int64_t stride) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l) add_multiple(from + i * stride, -rows[i * k + l], columns + l * width, width);
}

// The directions that a tail is known by: vectors [m, count] and, transposed, [count, m].
struct Basis {
  const double *by_row, *by_vector;
  int64_t m, count;
  bool others;  // they span what is not the tail

  // [count, width], of columns [m, stride]
  std::vector<double> projected(const double* columns, int64_t stride, int64_t width) const {
    std::vector<double> products(count * width);
    project(by_vector, count, m, columns, stride, width, products.data());
    return products;
  }

  // Replaces columns [m, width] by their part in the tail.
  void keep_tail(double* columns, int64_t width) const {
    const std::vector<double> products = projected(columns, width, width);
    if (others) subtract_product(by_row, m, count, products.data(), width, columns, width);
    else project(by_row, m, count, products.data(), width, width, columns);
  }

  // The squared norm of that part of columns [m, stride], which are overwritten.
  double tail_square(double* columns, int64_t stride, int64_t width) const {
    const std::vector<double> products = projected(columns, stride, width);
    if (!others) return squared_norm(products.data(), products.size());
    subtract_product(by_row, m, count, products.data(), width, columns, stride);
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += squared_norm(columns + i * stride, width);
    return sum;
  }
};

// ---- The operation.

template <typename T, typename Pointer>
Matrix<T> matrix_at(const Matrices& shape, Pointer* data, int64_t index) {
  return {static_cast<T*>(data) + index * shape.stride, shape.m, shape.n, shape.row_stride, shape.column_stride};
}

constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// what a multiplication and addition weighs against an element that is read from memory, in for_each_task's count
constexpr int64_t kOperationsPerElement = 64;

// The value of one matrix, and `count` vectors, [m, count]: those of the tail or of all others.
template <typename T>
double tail(const Matrix<const T>& matrix, int64_t count, bool others, double* vectors, bool threads) {
  const int64_t m = matrix.m, size = round_up(m, kTile);
  const int64_t elements = threads ? m * m * matrix.n / kOperationsPerElement : 0;
  const Pieces pieces(matrix.n);
  std::vector<double> rows(count * m);
  if (count > 0) {
    std::vector<double> grams(pieces.count * size * size), tau(m);
    for_each_task(pieces.count, elements, [&](int64_t piece) {
      pieces.for_each_panel(piece, matrix, [&](const double* columns, int64_t stride, int64_t width) {
        add_gram(columns, stride, width, grams.data() + piece * size * size, size);
      });
    });
    double* gram = grams.data();
    for (int64_t piece = 1; piece < pieces.count; ++piece)
      for (int64_t i = 0; i < size * size; ++i) gram[i] += grams[piece * size * size + i];
    double trace = 0;
    for (int64_t i = 0; i < m; ++i) trace += gram[i * size + i];
    if (!std::isfinite(trace)) {
      std::fill_n(vectors, m * count, kNotANumber);
      return kNotANumber;
    }
    if (trace == 0) {
      for (int64_t i = 0; i < m * count; ++i) vectors[i] = i / count == i % count;
      return 0;
    }
    const double scale = others ? -trace : trace;  // the others' eigenvalues are the smallest with the other sign
    for (int64_t i = 0; i < size * size; ++i) gram[i] /= scale;
    const Tridiagonal tridiagonal = tridiagonalize(gram, m, size, tau.data());
    eigenvectors(tridiagonal, smallest_eigenvalues(tridiagonal, count), rows.data());
    reflect_back(gram, m, size, tau.data(), count, rows.data());
    for (int64_t i = 0; i < m; ++i)
      for (int64_t index = 0; index < count; ++index) vectors[i * count + index] = rows[index * m + i];
  }
  // from the matrix, not from the eigenvalues: that keeps the digits that squaring lost
  const Basis basis{vectors, rows.data(), m, count, others};
  std::vector<double> values(pieces.count);
  for_each_task(pieces.count, elements, [&](int64_t piece) {
    pieces.for_each_panel(piece, matrix, [&](double* columns, int64_t stride, int64_t width) {
      values[piece] += basis.tail_square(columns, stride, width);
    });
  });
  const double value = std::accumulate(values.begin(), values.end(), 0.0);
  return std::isfinite(value) ? value : kNotANumber;
}

// A matrix of a list of tensors of matrices: the tensor's number in the list, and its own in the tensor.
struct Place {
  size_t tensor;
  int64_t index;
};

template <typename Call>
std::vector<Place> places(const std::vector<Call>& calls) {
  std::vector<Place> found;
  for (size_t tensor = 0; tensor < calls.size(); ++tensor)
    for (int64_t index = 0; index < calls[tensor].matrices.count; ++index) found.push_back({tensor, index});
  return found;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> spectral_tail_forward(const std::vector<Tensor>& inputs,
                                                                           const std::vector<int64_t>& k) {
  const std::vector<TailCall> calls = tail_calls(inputs, k);
  const std::vector<Place> all = places(calls);
  // Each matrix is a thread's work, or all threads take one after the other, if that takes less time: they share the
  // work that a matrix's columns make, and not that of its tridiagonal form.
  double shared = 0, alone = 0, longest = 0;  // in the time of a multiplication for the Gram matrix
  for (const TailCall& call : calls) {
    const auto [count, m, n, stride, row_stride, column_stride] = call.matrices;
    const double columns = 0.5 * m * m * n, form = 1.0 * m * m * (m + 300);  // measured, for m from 16 to 256
    shared += count * columns, alone += count * form;
    if (count > 0) longest = std::max(longest, columns + form);
  }
  const double threads = torch::stable::get_num_threads();
  const bool one_by_one = shared / threads + alone < std::max(longest, (shared + alone) / threads);
  const int64_t work = one_by_one ? 0 : static_cast<int64_t>(2 * shared) / kOperationsPerElement;
  for_each_task(all.size(), work, [&](int64_t task) {
    const TailCall& call = calls[all[task].tensor];
    const int64_t index = all[task].index, count = vector_count(call.matrices, call.k);
    const bool others = by_the_others(call.matrices, call.k);
    double* vectors = static_cast<double*>(call.vectors.mutable_data_ptr()) + index * call.matrices.m * count;
    dispatch(float_type(call.input), [&](auto zero) {
      using T = decltype(zero);
      const auto matrix = matrix_at<const T>(call.matrices, call.input.const_data_ptr(), index);
      const double value = call.k == 0 ? 0 : tail(matrix, count, others, vectors, one_by_one);
      static_cast<acc_t<T>*>(call.value.mutable_data_ptr())[index] = static_cast<acc_t<T>>(value);
    });
  });
  return results(calls);
}

// The gradient of one matrix in columns [begin, end).
template <typename T>
void write_gradient(const Matrix<const T>& matrix, const Matrix<T>& gradient, const Basis& basis, double factor,
                    int64_t begin, int64_t end) {
  const int64_t width = round_up(end - begin, kDoubles);
  std::vector<double> block(matrix.m * width);
  pack(matrix, begin, end, block.data(), width);
  basis.keep_tail(block.data(), width);
  for (double& value : block) value *= factor;
  unpack(block.data(), width, begin, end, gradient);
}

std::vector<Tensor> spectral_tail_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& inputs,
                                           const std::vector<Tensor>& vectors, const std::vector<int64_t>& k) {
  constexpr int64_t kWidth = 64;
  if (inputs.empty()) return {};
  const std::vector<TailGradientCall> calls = tail_gradient_calls(grads, inputs, vectors, k);
  for (const TailGradientCall& call : calls) {
    const Matrices &shape = call.matrices, outputs = matrices(call.gradient);
    const int64_t m = shape.m, count = vector_count(shape, call.k), blocks = ceil_div(shape.n, kWidth);
    const double* by_row = static_cast<const double*>(call.vectors.const_data_ptr());
    std::vector<double> by_vector(shape.count * count * m);
    for (int64_t index = 0; index < shape.count; ++index)
      for (int64_t i = 0; i < m * count; ++i)
        by_vector[(index * count + i % count) * m + i / count] = by_row[index * m * count + i];
    dispatch(float_type(call.input), [&](auto zero) {
      using T = decltype(zero);
      for_each_task(shape.count * blocks, shape.count * shape.n * m, [&](int64_t task) {
        const int64_t index = task / blocks, begin = task % blocks * kWidth, end = std::min(shape.n, begin + kWidth);
        const int64_t at = index * m * count;
        const Basis basis{by_row + at, by_vector.data() + at, m, count, by_the_others(shape, call.k)};
        const double grad = static_cast<const acc_t<T>*>(call.grad.const_data_ptr())[index];
        write_gradient(matrix_at<const T>(shape, call.input.const_data_ptr(), index),
                       matrix_at<T>(outputs, call.gradient.mutable_data_ptr(), index), basis, 2 * grad, begin, end);
      });
    });
  }
  return results(calls);
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CPU, m) {
  m.impl("spectral_tail_forward", TORCH_BOX(&talib_fast::spectral_tail_forward));
  m.impl("spectral_tail_backward", TORCH_BOX(&talib_fast::spectral_tail_backward));
}
