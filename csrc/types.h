// What kernels know of their operands, without torch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace talib_fast {

enum class FloatType : int { kFloat, kDouble, kHalf, kBFloat16 };

// f(a zero of that type); the narrow ones have other names on the CPU and in CUDA
template <typename Half, typename BFloat16, typename F>
constexpr void with_type(FloatType type, const F& f) {
  switch (type) {
    case FloatType::kFloat: return f(float{});
    case FloatType::kDouble: return f(double{});
    case FloatType::kHalf: return f(Half{});
    case FloatType::kBFloat16: return f(BFloat16{});
  }
}

// f(a zero of the target's type, one of the source's) where they are a pair that squared_distance's kernels read as it
// is: one type twice, or float and one of 16 bits. Says whether they are.
template <typename Half, typename BFloat16, typename F>
constexpr bool with_pair(FloatType target, FloatType source, const F& f) {
  bool is_pair = false;
  with_type<Half, BFloat16>(target, [&](auto t) {
    using T = decltype(t);
    with_type<Half, BFloat16>(source, [&](auto s) {
      using S = decltype(s);
      if constexpr (std::is_same_v<T, S> || sizeof(T) + sizeof(S) == 6) f(T{}, S{}), is_pair = true;
    });
  });
  return is_pair;
}

// What follows a normalisation: NAMES of talib_fast/ops/activation.py, in that order.
enum class Activation : int64_t { kNone, kRelu, kRelu6, kLeakyRelu, kSilu, kHardswish, kGelu };
constexpr Activation kLastActivation = Activation::kGelu;

// Those that are a straight line on each side of 0, and constant from a limit on. Their derivative is one of two
// numbers, so that one bit an element is all that a backward pass needs.
constexpr bool is_piecewise(Activation activation) { return activation <= Activation::kLeakyRelu; }

constexpr int64_t kSignsPerWord = 32;

// Which channels are chosen: numbers drawn for them that are below `p`, or flags where nothing is drawn. The sign of a
// number says that a forward pass is repeated, and nothing of its channel.
struct ChannelMask {
  const float* drawn;
  const bool* flags;
  float p;

  constexpr bool operator()(int64_t c) const { return drawn != nullptr ? (drawn[c] < p && -drawn[c] < p) : flags[c]; }
};

// One number per channel, of a type that is chosen at run time. No data: the operand is absent.
struct ChannelVector {
  void* data = nullptr;
  FloatType type = FloatType::kFloat;
  int64_t stride = 1;
};

// Two dense orders of the same elements: [outer, rows, columns, unit] and, with two neighbours exchanged, [outer,
// columns, rows, unit]. NCHW and NHWC differ so, and a matrix and its transpose. No rows: the orders are the same.
struct Exchange {
  int64_t rows = 0, columns = 1, unit = 1;
};

// The matrices of a tensor [b, f] or [count, b, f], their shorter side first: m × n, m <= n.
struct Matrices {
  int64_t count, m, n;
  int64_t stride, row_stride, column_stride;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace talib_fast
