// Compiled by nvcc this registers the kernels for CUDA; by g++, with the harness of tests/simt, the same ones for CPU.
#include "stoch_norm.cuh"

#include "../stoch_norm.h"
#include "stream.h"

namespace talib_fast {
namespace {

template <typename Op>
void run(const Op& op, const ChannelView& view, const Tensor& input) {
  if (view.channels == 0) return;
  const stoch_norm::Shape shape{view.outer, view.channels, view.inner};
  stoch_norm::with_vectors(op, shape, [&](auto vector, auto rows) {
    const Device device = current_device();
    const stoch_norm::Plan plan = stoch_norm::choose_plan<Op, vector(), rows()>(shape, device);
    const Scratch workspace(input, static_cast<int64_t>(plan.workspace_bytes));
    stoch_norm::launch<Op, vector(), rows()>(op, plan, device, workspace.data(), current_stream(input));
  });
}

template <typename T>
void forward(const ForwardCall& call) {
  using A = acc_t<T>;
  const stoch_norm::Forward<T> op{static_cast<const T*>(call.input.const_data_ptr()),
                                  static_cast<T*>(call.output.mutable_data_ptr()),
                                  static_cast<A*>(call.mean.mutable_data_ptr()),
                                  static_cast<A*>(call.invstd.mutable_data_ptr()),
                                  call.mask.channels,
                                  call.weight,
                                  call.bias,
                                  call.running.mean,
                                  call.running.var,
                                  call.moved.mean,
                                  call.moved.var,
                                  call.batches,
                                  static_cast<A>(call.momentum),
                                  static_cast<A>(call.eps),
                                  call.view.per_channel()};
  run(op, call.view, call.input);
}

template <typename T>
void backward(const BackwardCall& call) {
  using A = acc_t<T>;
  const stoch_norm::Backward<T> op{static_cast<const T*>(call.input.const_data_ptr()),
                                   static_cast<const T*>(call.grad_output.const_data_ptr()),
                                   static_cast<T*>(call.grad_input.mutable_data_ptr()),
                                   static_cast<const A*>(call.mean.const_data_ptr()),
                                   static_cast<const A*>(call.invstd.const_data_ptr()),
                                   call.mask.channels,
                                   call.weight,
                                   static_cast<A*>(call.grad_weight.mutable_data_ptr()),
                                   static_cast<A*>(call.grad_bias.mutable_data_ptr()),
                                   call.view.per_channel()};
  run(op, call.view, call.input);
}

std::tuple<Tensor, Tensor, Tensor> stoch_norm_forward(const Tensor& input, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, const Tensor& running_mean,
                                                      const Tensor& running_var, const Tensor& mask, double momentum,
                                                      double eps, double p,
                                                      const std::optional<Tensor>& num_batches_tracked) {
  const DeviceGuard guard(input);
  const RunningStatistics running{channel_vector(running_mean, input, "running_mean"),
                                  channel_vector(running_var, input, "running_var")};
  const ForwardCall call =
      forward_call(input, weight, bias, running, running, mask, momentum, eps, p, num_batches_tracked);
  with_type(float_type(input), [&](auto zero) { forward<decltype(zero)>(call); });
  return {call.output, call.mean, call.invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stoch_norm_functional(const Tensor& input,
                                                                 const std::optional<Tensor>& weight,
                                                                 const std::optional<Tensor>& bias,
                                                                 const Tensor& running, const Tensor& mask, double eps,
                                                                 double p) {
  const DeviceGuard guard(input);
  const FunctionalCall call = functional_call(input, weight, bias, running, mask, eps, p);
  with_type(float_type(input), [&](auto zero) { forward<decltype(zero)>(call.forward); });
  return {call.forward.output, call.forward.mean, call.forward.invstd, call.batch};
}

std::tuple<Tensor, Tensor, Tensor> stoch_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& mean, const Tensor& invstd,
                                                       const std::optional<Tensor>& weight, const Tensor& mask,
                                                       double p) {
  const DeviceGuard guard(input);
  const BackwardCall call = backward_call(grad_output, input, mean, invstd, weight, mask, p);
  with_type(float_type(input), [&](auto zero) { backward<decltype(zero)>(call); });
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, TALIB_FAST_KERNEL_DEVICE, m) {
  if (!talib_fast::driver_serves_kernels()) return;
  m.impl("stoch_norm_forward", TORCH_BOX(&talib_fast::stoch_norm_forward));
  m.impl("stoch_norm_functional", TORCH_BOX(&talib_fast::stoch_norm_functional));
  m.impl("stoch_norm_backward", TORCH_BOX(&talib_fast::stoch_norm_backward));
}
