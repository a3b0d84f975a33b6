// Compiled by nvcc this registers the kernels for CUDA; by g++, with the harness of tests/simt, the same ones for CPU.
#include "stoch_norm.cuh"

#include "../stoch_norm.h"
#include "counters.cuh"
#include "registration.h"
#include "stream.h"

namespace talib_fast {
namespace {

template <typename Op>
void run(const Op& op, const ChannelView& view, const Tensor& input) {
  if (view.channels == 0) return;
  const stoch_norm::Shape shape{view.outer, view.channels, view.inner};
  const Device device = current_device();
  const cudaStream_t stream = current_stream(input);
  stoch_norm::with_vectors(op, shape, device, [&](auto vector, auto rows) {
    const stoch_norm::Plan plan = stoch_norm::choose_plan<Op, vector(), rows()>(shape, device);
    const Scratch workspace(input, static_cast<int64_t>(plan.workspace_bytes));
    const Counters counters(input, plan.counters, stream);
    stoch_norm::launch<Op, vector(), rows()>(op, plan, device, workspace.data(), counters.data(), stream);
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
void forward_of(const ForwardCall& call) {
  using A = acc_t<T>;
  const int64_t channels = call.view.channels;
  A* statistics = static_cast<A*>(call.statistics.mutable_data_ptr());
  run(
      stoch_norm::Forward<T, kFused>{
          .x = static_cast<const T*>(call.input.const_data_ptr()),
          .residual = data<const T>(call.residual),
          .out = static_cast<T*>(call.output.mutable_data_ptr()),
          .signs = call.signs.numel() == 0 ? nullptr : static_cast<unsigned*>(call.signs.mutable_data_ptr()),
          .mean = statistics,
          .rstd = statistics + channels,
          .mask = call.mask.channels,
          .weight = call.weight,
          .bias = call.bias,
          .running_mean = call.running.mean,
          .running_var = call.running.var,
          .updated_mean = call.updated.mean,
          .updated_var = call.updated.var,
          .batches = call.batches,
          .momentum = static_cast<A>(call.momentum),
          .eps = static_cast<A>(call.eps),
          .count = call.view.per_channel(),
          .activated = activated<A>(call.epilogue),
      },
      call.view, call.input);
}

template <typename T, bool kFused>
void backward_of(const BackwardCall& call) {
  using A = acc_t<T>;
  const int64_t channels = call.view.channels;
  const A* statistics = static_cast<const A*>(call.statistics.const_data_ptr());
  run(
      stoch_norm::Backward<T, kFused>{
          .x = static_cast<const T*>(call.input.const_data_ptr()),
          .dy = static_cast<const T*>(call.grad_output.const_data_ptr()),
          .out = static_cast<T*>(call.grad_input.mutable_data_ptr()),
          .signs = data<const unsigned>(call.signs),
          .dz = static_cast<T*>(call.grad_residual.mutable_data_ptr()),
          .mean = statistics,
          .rstd = statistics + channels,
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

struct Kernels {
  using Guard = DeviceGuard;

  static void forward(const ForwardCall& call) {
    with_type(float_type(call.input), [&](auto zero) {
      using T = decltype(zero);
      const bool fused = call.residual || call.epilogue.activation != Activation::kNone;
      fused ? forward_of<T, true>(call) : forward_of<T, false>(call);
    });
  }

  static void backward(const BackwardCall& call) {
    with_type(float_type(call.input), [&](auto zero) {
      using T = decltype(zero);
      const bool fused = call.epilogue.activation != Activation::kNone;
      fused ? backward_of<T, true>(call) : backward_of<T, false>(call);
    });
  }
};

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, TALIB_FAST_KERNEL_DEVICE, m) {
  using Operators = talib_fast::Operators<talib_fast::Kernels>;
  talib_fast::register_kernel<"stoch_norm_forward", &Operators::forward>(m);
  talib_fast::register_kernel<"stoch_norm_functional", &Operators::functional>(m);
  talib_fast::register_kernel<"stoch_norm_backward", &Operators::backward>(m);
}
