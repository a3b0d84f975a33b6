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
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

template <typename A>
stoch_norm::Activated<A> activated(const Epilogue& epilogue) {
  return {epilogue.activation, static_cast<A>(epilogue.slope), static_cast<A>(epilogue.limit)};
}

template <typename T, bool kFused>
void forward(const ForwardCall& call) {
  using A = acc_t<T>;
  const int64_t channels = call.view.channels;
  A* statistics = static_cast<A*>(call.statistics.mutable_data_ptr());
  run(stoch_norm::Forward<T, kFused>{
          .x = static_cast<const T*>(call.input.const_data_ptr()),
          .residual = data<const T>(call.residual),
          .out = static_cast<T*>(call.output.mutable_data_ptr()),
          .signs = call.signs.numel() == 0 ? nullptr : static_cast<unsigned*>(call.signs.mutable_data_ptr()),
          .mean = statistics,
          .invstd = statistics + channels,
          .mask = call.mask.channels,
          .weight = call.weight,
          .bias = call.bias,
          .running_mean = call.running.mean,
          .running_var = call.running.var,
          .moved_mean = call.moved.mean,
          .moved_var = call.moved.var,
          .batches = call.batches,
          .momentum = static_cast<A>(call.momentum),
          .eps = static_cast<A>(call.eps),
          .count = call.view.per_channel(),
          .activated = activated<A>(call.epilogue),
      },
      call.view, call.input);
}

template <typename T, bool kFused>
void backward(const BackwardCall& call) {
  using A = acc_t<T>;
  const int64_t channels = call.view.channels;
  const A* statistics = static_cast<const A*>(call.statistics.const_data_ptr());
  run(stoch_norm::Backward<T, kFused>{
          .x = static_cast<const T*>(call.input.const_data_ptr()),
          .dy = static_cast<const T*>(call.grad_output.const_data_ptr()),
          .out = static_cast<T*>(call.grad_input.mutable_data_ptr()),
          .signs = data<const unsigned>(call.signs),
          .dz = static_cast<T*>(call.grad_residual.mutable_data_ptr()),
          .mean = statistics,
          .invstd = statistics + channels,
          .mask = call.mask.channels,
          .weight = call.weight,
          .bias = call.bias,
          .dweight = static_cast<A*>(call.grad_weight.mutable_data_ptr()),
          .dbias = static_cast<A*>(call.grad_bias.mutable_data_ptr()),
          .count = call.view.per_channel(),
          .activated = activated<A>(call.epilogue),
      },
      call.view, call.input);
}

void run_forward(const ForwardCall& call) {
  with_type(float_type(call.input), [&](auto zero) {
    using T = decltype(zero);
    const bool fused = call.residual || call.epilogue.activation != Activation::kNone;
    fused ? forward<T, true>(call) : forward<T, false>(call);
  });
}

std::tuple<Tensor, Tensor, Tensor> stoch_norm_forward(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const Tensor& running_mean, const Tensor& running_var, const Tensor& mask, double momentum, double eps, double p,
    const std::optional<Tensor>& num_batches_tracked, const std::optional<Tensor>& residual, int64_t activation,
    double negative_slope) {
  const DeviceGuard guard(input);
  const RunningStatistics running{channel_vector(running_mean, input, "running_mean"),
                                  channel_vector(running_var, input, "running_var")};
  const ForwardCall call = forward_call(input, weight, bias, running, running, mask, momentum, eps, p,
                                        num_batches_tracked, residual, epilogue(activation, negative_slope));
  run_forward(call);
  return {call.output, call.statistics, call.signs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stoch_norm_functional(
    const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& running,
    const Tensor& mask, double eps, double p, const std::optional<Tensor>& residual, int64_t activation,
    double negative_slope) {
  const DeviceGuard guard(input);
  const FunctionalCall call = functional_call(input, weight, bias, running, mask, eps, p, residual,
                                              epilogue(activation, negative_slope));
  run_forward(call.forward);
  return {call.forward.output, call.forward.statistics, call.forward.signs, call.batch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stoch_norm_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& statistics, const std::optional<Tensor>& weight,
    const Tensor& mask, double p, const std::optional<Tensor>& bias, const std::optional<Tensor>& signs,
    int64_t activation, double negative_slope) {
  const DeviceGuard guard(input);
  const BackwardCall call = backward_call(grad_output, input, statistics, weight, mask, p, bias, signs,
                                          epilogue(activation, negative_slope));
  with_type(float_type(input), [&](auto zero) {
    using T = decltype(zero);
    const bool fused = call.epilogue.activation != Activation::kNone;
    fused ? backward<T, true>(call) : backward<T, false>(call);
  });
  return {call.grad_input, call.grad_weight, call.grad_bias, call.grad_residual};
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, TALIB_FAST_KERNEL_DEVICE, m) {
  if (!talib_fast::driver_serves_kernels()) return;
  m.impl("stoch_norm_forward", TORCH_BOX(&talib_fast::stoch_norm_forward));
  m.impl("stoch_norm_functional", TORCH_BOX(&talib_fast::stoch_norm_functional));
  m.impl("stoch_norm_backward", TORCH_BOX(&talib_fast::stoch_norm_backward));
}
