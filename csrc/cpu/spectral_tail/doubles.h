// Vectors of doubles, of a register's width and of any length.
#pragma once

#include <cstdint>

#include "../simd.h"

namespace talib_fast {
namespace {

typedef Lanes<double>::type Doubles;

constexpr int64_t kDoubles = 8;

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

}  // namespace
}  // namespace talib_fast
