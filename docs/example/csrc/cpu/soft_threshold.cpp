#include "../soft_threshold.h"

#include <algorithm>

#include "simd.h"
#include "tasks.h"

namespace talib_fast {
namespace {

// ---- Loops over memory. Each is written once, for 64 bytes of values (simd.h) and for a single one, and compiled for
// AVX-512, AVX2 and the baseline; the processor that runs it decides.

// The forward pass reads one tensor, the backward pass two. V: lanes or a single value.
template <int kTensors, typename V>
INLINE V output(const V& x, const V& dy, const V& threshold) {
  if constexpr (kTensors == 1) {
    const V raised = x < -threshold ? -threshold : x, nearest = raised > threshold ? threshold : raised;
    return x - nearest;  // selects, not a blend: infinities stay, and NaN
  } else {
    return (x >= -threshold) & (x <= threshold) ? V{} : dy;
  }
}

// In the forward pass there is no dy, and x stands for it.
template <int kTensors, typename T>
SIMD_CLONES void write_run(const T* x, const T* dy, T* out, int64_t n, acc_t<T> threshold, bool stream) {
  using V = lanes_t<T>;  // of the accumulation dtype: half precision is converted on the way
  constexpr int64_t kStep = kLanes<T>;
  const V thresholds = V{} + threshold;
  const auto single = [&](int64_t i) __attribute__((always_inline)) {
    using A = acc_t<T>;
    out[i] = static_cast<T>(output<kTensors>(static_cast<A>(x[i]), static_cast<A>(dy[i]), threshold));
  };
  const auto lanes = [&](int64_t i) __attribute__((always_inline)) {
    return output<kTensors>(load_lanes(x + i), load_lanes(dy + i), thresholds);
  };
  int64_t i = 0;
  if (stream) {  // past the caches, which asks for whole lines
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64 != 0; ++i) single(i);
    for (; i + kStep <= n; i += kStep) store_lanes<true>(out + i, lanes(i));
  }
  for (; i + kStep <= n; i += kStep) store_lanes(out + i, lanes(i));
  for (; i < n; ++i) single(i);
}

// ---- The operation

template <int kTensors>
Tensor run(const ThresholdCall& call, double threshold) {
  constexpr int64_t kPiece = 65536;  // elements of a task: how many there are does not depend on the threads
  with_type(float_type(call.input), [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(call.input.const_data_ptr());
    const T* dy = kTensors == 1 ? x : static_cast<const T*>(call.grad_output.const_data_ptr());
    T* out = static_cast<T*>(call.output.mutable_data_ptr());
    const int64_t bytes = call.elements * static_cast<int64_t>(sizeof(T));
    const bool stream = (kTensors + 1) * bytes > kSharedCache;
    advise_huge_pages(out, bytes);
    for_each_task(ceil_div(call.elements, kPiece), call.elements, [&](int64_t task) {
      const int64_t at = task * kPiece, n = std::min(kPiece, call.elements - at);
      write_run<kTensors>(x + at, dy + at, out + at, n, static_cast<acc_t<T>>(threshold), stream);
      settle(stream);
    });
  });
  return call.output;
}

Tensor soft_threshold_forward(const Tensor& input, double threshold) {
  return run<1>(threshold_call(input), threshold);
}

Tensor soft_threshold_backward(const Tensor& grad_output, const Tensor& input, double threshold) {
  return run<2>(threshold_gradient_call(grad_output, input), threshold);
}

}  // namespace
}  // namespace talib_fast

// Over the PyTorch implementation, which keeps serving every other device. TORCH_BOX makes the boxed function that the
// stable ABI wants from these signatures, which have to be the schema's.
STABLE_TORCH_LIBRARY_IMPL(talib_fast, CPU, m) {
  m.impl("soft_threshold_forward", TORCH_BOX(&talib_fast::soft_threshold_forward));
  m.impl("soft_threshold_backward", TORCH_BOX(&talib_fast::soft_threshold_backward));
}
