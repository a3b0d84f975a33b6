// Activations and their derivatives. A piecewise one is a straight line on each side of 0. A smooth one is z * g(z)
// with a gate g that goes from 0 to 1. `lanes`, which is `Registers` of registers.h, makes conditions and the like.
#pragma once

#include "../../stoch_norm.h"
#include "../elementary.h"
#include "../simd.h"

#include <type_traits>

namespace talib_fast {
namespace {

struct Identity {
  template <typename Access, typename V>
  INLINE V operator()(const Access&, const V& z) const {
    return z;
  }
};

template <typename A>
struct Piecewise {
  A slope, limit;
  int leaks;  // -1, or 0 where the slope is: then even an infinite value gives 0

  explicit Piecewise(const Epilogue& epilogue)
      : slope(static_cast<A>(epilogue.slope)), limit(static_cast<A>(epilogue.limit)), leaks(slope == 0 ? 0 : -1) {}

  template <typename Access, typename V>
  INLINE V operator()(const Access& lanes, const V& z) const {
    const V above = lanes.min(V{} + limit, lanes.max(V{}, z));
    if (Access::kBranches && leaks == 0) return above;
    return lanes.select(lanes.less(z, V{}) & leaks, slope * z, above);
  }
  // where the derivative is 1 and not the slope
  template <typename Access, typename V>
  INLINE auto passes(const Access& lanes, const V& z) const {
    return lanes.less(V{}, z) & lanes.less(z, V{} + limit);
  }
  template <typename Access, typename Condition, typename V>
  INLINE V gradient(const Access& lanes, const Condition& passes, const V& dy) const {
    if (Access::kBranches && leaks == 0) return lanes.select(passes, dy, V{});
    return lanes.select(passes, dy, lanes.select(lanes.template all<V>() & leaks, slope * dy, V{}));
  }
};

template <Activation kActivation>
struct Smooth {
  // g(z), and with it z * g'(z), the rest of the derivative; far below 0 both are exactly 0.
  template <typename Access, typename V>
  INLINE void gate(const Access& lanes, const V& z, V& g, V& z_dg) const {
    using A = std::remove_cvref_t<decltype(z[0])>;
    constexpr A kSixth = A(1) / 6, kDensity = 0.39894228040143267794;  // that of a normal variable at 0
    const V largest = V{} + kLargest<A>;
    if constexpr (kActivation == Activation::kHardswish) {
      const V inside = lanes.max(V{} - 3, lanes.min(V{} + 3, z));
      g = (inside + 3) * kSixth;  // 0 up to -3, to the last bit
      z_dg = lanes.select(lanes.less(inside * inside, V{} + 9), inside * kSixth, V{});
    } else if constexpr (kActivation == Activation::kSilu) {
      const V inside = lanes.max(-largest, lanes.min(largest, z)), power = exponential(-inside);
      const V sigmoid = lanes.reciprocal(1 + power);
      g = lanes.select(lanes.less(-largest, z), sigmoid, V{});
      z_dg = g * (inside * (power * sigmoid));
    } else {
      static_assert(kActivation == Activation::kGelu);
      const V size = lanes.max(z, -z), exponent = size * size * A(-0.5);
      const V power = lanes.select(lanes.less(-largest, exponent), exponential(lanes.max(-largest, exponent)), V{});
      const V least = upper_tail(size, power);
      g = lanes.select(lanes.less(V{}, z), 1 - least, least);
      z_dg = lanes.min(largest, lanes.max(-largest, z)) * (power * kDensity);
    }
  }
  template <typename Access, typename V>
  INLINE V operator()(const Access& lanes, const V& z) const {
    V g, z_dg;
    gate(lanes, z, g, z_dg);
    return z * g;
  }
  // a select: where the activation is flat, an infinite gradient is 0
  template <typename Access, typename V>
  INLINE V gradient(const Access& lanes, const V& z, const V& dy) const {
    V g, z_dg;
    gate(lanes, z, g, z_dg);
    const V slope = g + z_dg;
    return lanes.select(lanes.not_zero(slope), dy * slope, V{});
  }
};

template <typename Act>
constexpr bool is_smooth = false;
template <Activation kActivation>
constexpr bool is_smooth<Smooth<kActivation>> = true;

// f(the activation, whether there is a residual)
template <typename A, typename F>
void with_activation(const Epilogue& epilogue, bool residual, const F& f) {
  if (residual) return f(Piecewise<A>(epilogue), std::true_type{});
  switch (epilogue.activation) {
    case Activation::kNone: return f(Identity{}, std::false_type{});
    case Activation::kSilu: return f(Smooth<Activation::kSilu>{}, std::false_type{});
    case Activation::kHardswish: return f(Smooth<Activation::kHardswish>{}, std::false_type{});
    case Activation::kGelu: return f(Smooth<Activation::kGelu>{}, std::false_type{});
    case Activation::kRelu:
    case Activation::kRelu6:
    case Activation::kLeakyRelu: return f(Piecewise<A>(epilogue), std::false_type{});
  }
}

}  // namespace
}  // namespace talib_fast
