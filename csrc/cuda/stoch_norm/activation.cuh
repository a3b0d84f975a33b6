// What follows the norm: the activations and their derivatives.
#pragma once

#include "channel.cuh"

namespace talib_fast::stoch_norm {

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + exp(-z)); }
__device__ __forceinline__ double sigmoid(double z) { return 1 / (1 + exp(-z)); }

// The distribution function of the standard normal distribution.
template <typename A>
__device__ __forceinline__ A normal(A z) {
  return A(0.5) * (1 + erf(z * A(0.70710678118654752)));
}

// The activation of z = norm(x) + residual. Its switch is equal for all threads, and stands outside the loops.
template <typename A>
struct Activated {
  Activation activation;
  A slope, limit;  // of the piecewise ones: a line below 0, and constant from the limit on (NaN: there is none)

  __device__ __forceinline__ bool derivative_is_one(A z) const { return !(z <= 0) && !(z >= limit); }

  // With a slope of 0 even an infinite value gives 0.
  __device__ __forceinline__ A times_slope(A value) const { return slope == 0 ? A(0) : slope * value; }

  template <int V>
  __device__ __forceinline__ void apply(A (&z)[V]) const {
    switch (activation) {
      case Activation::kSilu: return for_each_lane<V>([&](int i) { z[i] *= sigmoid(z[i]); });
      case Activation::kHardswish:
        return for_each_lane<V>([&](int i) { z[i] = z[i] * fmin(fmax(z[i] + 3, A(0)), A(6)) * A(1.0 / 6); });
      case Activation::kGelu: return for_each_lane<V>([&](int i) { z[i] *= normal(z[i]); });
      case Activation::kNone:
      case Activation::kRelu:
      case Activation::kRelu6:
      case Activation::kLeakyRelu:
        for_each_lane<V>([&](int i) { z[i] = z[i] < 0 ? times_slope(z[i]) : z[i] > limit ? limit : z[i]; });
    }
  }

  // Multiplies dy by the derivative at z.
  template <int V>
  __device__ __forceinline__ void differentiate(const A (&z)[V], A (&dy)[V]) const {
    switch (activation) {
      case Activation::kSilu:
        return for_each_lane<V>([&](int i) {
          const A s = sigmoid(z[i]);
          dy[i] *= s * (1 + z[i] * (1 - s));
        });
      case Activation::kHardswish:
        return for_each_lane<V>([&](int i) {
          dy[i] = z[i] <= -3 ? A(0) : z[i] < 3 ? dy[i] * (z[i] * A(1.0 / 3) + A(0.5)) : dy[i];
        });
      case Activation::kGelu:
        return for_each_lane<V>(
            [&](int i) { dy[i] *= normal(z[i]) + z[i] * (A(0.39894228040143268) * exp(A(-0.5) * z[i] * z[i])); });
      case Activation::kNone:
      case Activation::kRelu:
      case Activation::kRelu6:
      case Activation::kLeakyRelu:
        for_each_lane<V>([&](int i) { dy[i] = derivative_is_one(z[i]) ? dy[i] : times_slope(dy[i]); });
    }
  }
};

}  // namespace talib_fast::stoch_norm
