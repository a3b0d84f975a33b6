// Checks, allocates, launches and registers. Compiled by nvcc this registers the kernels for CUDA; by g++, with the
// harness of tests/simt, the same ones for CPU.
#include "soft_threshold.cuh"

#include "../soft_threshold.h"
#include "registration.h"
#include "stream.h"

namespace talib_fast {
namespace {

template <bool kBackward>
Tensor run(const ThresholdCall& call, double threshold) {
  with_type(float_type(call.input), [&](auto zero) {
    using T = decltype(zero);
    soft_threshold::Operands<T> operands{};
    operands.x = static_cast<const T*>(call.input.const_data_ptr());
    if (kBackward) operands.dy = static_cast<const T*>(call.grad_output.const_data_ptr());
    operands.out = static_cast<T*>(call.output.mutable_data_ptr());
    operands.elements = call.elements;
    operands.threshold = static_cast<acc_t<T>>(threshold);
    soft_threshold::launch<kBackward>(operands, current_device().multiprocessors, current_stream(call.input));
  });
  return call.output;
}

Tensor soft_threshold_forward(const Tensor& input, double threshold) {
  // first of all: what is allocated and launched goes to the current device
  const DeviceGuard guard(input.get_device_index());
  return run<false>(threshold_call(input), threshold);
}

Tensor soft_threshold_backward(const Tensor& grad_output, const Tensor& input, double threshold) {
  const DeviceGuard guard(input.get_device_index());
  return run<true>(threshold_gradient_call(grad_output, input), threshold);
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, TALIB_FAST_KERNEL_DEVICE, m) {
  talib_fast::register_kernel<"soft_threshold_forward", &talib_fast::soft_threshold_forward>(m);
  talib_fast::register_kernel<"soft_threshold_backward", &talib_fast::soft_threshold_backward>(m);
}
