// The smallest eigenvalues of a symmetric matrix of trace 1 or -1, and their vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "doubles.h"

namespace talib_fast {
namespace {

struct Tridiagonal {
  std::vector<double> diagonal, off_diagonal;  // m and m - 1

  // bounds of the eigenvalues, by Gershgorin's circles
  std::pair<double, double> bounds() const {
    double lowest = diagonal[0], highest = diagonal[0];
    const int64_t m = diagonal.size();
    for (int64_t i = 0; i < m; ++i) {
      const double radius = (i == 0 ? 0 : std::abs(off_diagonal[i - 1])) + (i + 1 == m ? 0 : std::abs(off_diagonal[i]));
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
    t.off_diagonal[j] = first;
    tau[j] = 0;
    if (rest == 0) continue;
    const double reflected = -std::copysign(std::sqrt(first * first + rest), first);
    t.off_diagonal[j] = reflected;
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
  for (int64_t i = 1; i < m; ++i) squares[i] = t.off_diagonal[i - 1] * t.off_diagonal[i - 1];
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
      : lower_(t.off_diagonal),
        pivots_(t.diagonal),
        upper_(t.off_diagonal),
        second_(t.diagonal.size()),
        swapped_(lower_.size()) {
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

}  // namespace
}  // namespace talib_fast
