// The exponential function and the normal distribution, lane by lane.
#pragma once

#include <cmath>

#include "simd.h"

namespace talib_fast {
namespace {

// sum of c[i] * x^i
template <typename V, int kCount>
INLINE V polynomial(const V& x, const float (&c)[kCount]) {
  V sum = V{} + c[kCount - 1];
#pragma GCC unroll 8
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

template <typename F>
INLINE Lanes<double>::type each_lane(const Lanes<double>::type& x, const F& f) {
  Lanes<double>::type y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = f(x[i]);
  return y;
}

// Up to here e^x and its reciprocal are normal numbers.
template <typename A>
constexpr A kLargest = std::is_same_v<A, float> ? 87 : 700;

// e^x for |x| <= kLargest
INLINE Floats exponential(const Floats& x) {
  constexpr float kInteger = 0x1.8p23f;  // added to a small number it leaves an integer in the lowest bits
  const Floats shifted = x * 0x1.715476p0f + kInteger, n = shifted - kInteger;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // x - n * ln 2, within ±ln 2 / 2
  const Floats mantissa = polynomial(r, {1.f, 1.f, 0.4999923f, 0.16667116f, 0.04189033f, 0.008312502f});
  return bits_of<Floats>(bits_of<Bits>(mantissa) + (bits_of<Bits>(shifted) << 23));
}
INLINE Lanes<double>::type exponential(const Lanes<double>::type& x) {
  return each_lane(x, [](double lane) { return std::exp(lane); });
}

// The probability that a standard normal variable exceeds x >= 0, where power = e^(-x²/2).
INLINE Floats upper_tail(const Floats& x, const Floats& power) {
  const Floats t = 1 / (1 + 0.2316419f * x);
  // the quotient of tail and power, fitted to a relative error of 1.3e-7 up to x = 14
  return power * t *
         polynomial(t, {0.09252225f, 0.090420075f, 0.10265044f, 0.013551759f, 0.22525345f, -0.20166048f, 0.24768672f,
                        -0.070424154f});
}
INLINE Lanes<double>::type upper_tail(const Lanes<double>::type& x, const Lanes<double>::type&) {
  return each_lane(x, [](double lane) { return 0.5 * std::erfc(lane * M_SQRT1_2); });
}

}  // namespace
}  // namespace talib_fast
