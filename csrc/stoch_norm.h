// What the CPU and the CUDA kernel of stoch_norm share: the operators, and their operands, checked and in the form that
// both kernels read.
#pragma once

#include <limits>
#include <tuple>

#include "operands.h"

namespace talib_fast {

inline void check_channels(const Tensor& vector, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == input.size(1), "expected ", name, " of shape [", input.size(1),
                  "]");
  STD_TORCH_CHECK(vector.device() == input.device(), "expected ", name, " on the input's device");
}

inline ChannelVector channel_vector(const Tensor& vector, const Tensor& input, const char* name) {
  check_channels(vector, input, name);
  return {vector.data_ptr(), float_type(vector), vector.stride(0)};
}

inline ChannelVector channel_vector(const std::optional<Tensor>& vector, const Tensor& input, const char* name) {
  return vector ? channel_vector(*vector, input, name) : ChannelVector{};
}

// A mask, and the tensor that it reads, which may be a copy.
struct Mask {
  Tensor values;
  ChannelMask channels;
};

struct RunningStatistics {
  ChannelVector mean, var;
};

// What follows the norm: act(norm(x) + residual). A backward pass computes the activation's input once more. With a
// residual it cannot, because it does not have the residual. It then reads signs: a bit for each element in 32-bit
// words, in the order in which the output lies in memory. A bit is set where the activation's derivative is 1;
// elsewhere the derivative is the slope. Without a residual, or without an activation, there are no signs.
struct Epilogue {
  Activation activation;
  double slope;  // of the piecewise ones, below 0
  double limit;  // from which on these are constant; NaN: there is none

  bool keeps_signs(bool residual) const { return residual && activation != Activation::kNone; }
};

struct ForwardCall {
  ChannelView view;
  Tensor input, output, statistics, signs;
  std::optional<Tensor> residual;  // in memory as the output
  Epilogue epilogue;
  Mask mask;
  ChannelVector weight, bias;
  RunningStatistics running, updated;  // updated: the running ones again, or where their new values go instead
  int64_t* batches;                    // to count this one; null: there is no counter, or nothing to count
  double momentum, eps;
};

struct BackwardCall {
  ChannelView view;
  Tensor grad_output, input, statistics, grad_input, grad_weight, grad_bias;
  std::optional<Tensor> signs;
  Tensor grad_residual;  // with signs in memory as the input's gradient, else empty
  Epilogue epilogue;
  Mask mask;
  ChannelVector weight, bias;
};

inline Mask channel_mask(const Tensor& mask, double p, const Tensor& input) {
  check_channels(mask, input, "mask");
  const bool drawn = mask.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(drawn || mask.scalar_type() == ScalarType::Bool, "expected a bool or float32 mask");
  const Tensor values = contiguous_vector(mask);
  const void* data = values.const_data_ptr();
  return {values,
          {drawn ? static_cast<const float*>(data) : nullptr, drawn ? nullptr : static_cast<const bool*>(data),
           static_cast<float>(p)}};
}

inline int64_t* counter(const std::optional<Tensor>& batches, const Tensor& input) {
  if (!batches || input.numel() == 0) return nullptr;
  STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1,
                  "expected one int64 in num_batches_tracked");
  STD_TORCH_CHECK(batches->device() == input.device(), "expected num_batches_tracked on the input's device");
  return static_cast<int64_t*>(batches->mutable_data_ptr());
}

inline Epilogue epilogue(int64_t activation, double negative_slope) {
  STD_TORCH_CHECK(0 <= activation && activation <= static_cast<int64_t>(kLastActivation),
                  "expected an activation from 0 to ", static_cast<int64_t>(kLastActivation));
  const Activation chosen{activation};
  const double slope = chosen == Activation::kNone ? 1 : chosen == Activation::kLeakyRelu ? negative_slope : 0;
  const double limit = chosen == Activation::kRelu6 ? 6 : std::numeric_limits<double>::quiet_NaN();
  return {chosen, slope, limit};
}

inline void check_like(const Tensor& tensor, const Tensor& input, const char* name) {
  bool same =
      tensor.dim() == input.dim() && tensor.scalar_type() == input.scalar_type() && tensor.device() == input.device();
  for (int64_t dim = 0; same && dim < input.dim(); ++dim) same = tensor.size(dim) == input.size(dim);
  STD_TORCH_CHECK(same, "expected ", name, " of the input's shape, dtype and device");
}

// Mean and 1 / standard deviation per channel, [2, channels].
inline Tensor empty_statistics(const Tensor& input) {
  const int64_t sizes[] = {2, input.size(1)}, strides[] = {input.size(1), 1};
  return empty_strided(input, 2, sizes, strides, accumulation_type(input.scalar_type()));
}

inline ForwardCall forward_call(const Tensor& input, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, const RunningStatistics& running,
                                const RunningStatistics& updated, const Tensor& mask, double momentum, double eps,
                                double p, const std::optional<Tensor>& num_batches_tracked,
                                const std::optional<Tensor>& residual, const Epilogue& epilogue) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input of shape [N, C, *]");
  float_type(input);
  if (residual) {
    STD_TORCH_CHECK(is_piecewise(epilogue.activation), "expected no residual with this activation");
    check_like(*residual, input, "residual");
  }
  Tensor output = dense_like(input);
  const Tensor dense = laid_out_as(input, output);
  const int64_t words = epilogue.keeps_signs(residual.has_value()) ? ceil_div(input.numel(), kSignsPerWord) : 0;
  return {channel_view(dense, 1).value(),
          dense,
          output,
          empty_statistics(input),
          empty_vector(input, words, ScalarType::Int),
          residual ? std::optional<Tensor>(laid_out_as(*residual, output)) : std::nullopt,
          epilogue,
          channel_mask(mask, p, input),
          channel_vector(weight, input, "weight"),
          channel_vector(bias, input, "bias"),
          running,
          updated,
          counter(num_batches_tracked, input),
          momentum,
          eps};
}

// Of [2, channels], contiguous.
inline RunningStatistics rows(const Tensor& statistics) {
  const ChannelVector mean{statistics.data_ptr(), float_type(statistics), 1};
  const int64_t bytes = statistics.size(1) * static_cast<int64_t>(statistics.element_size());
  return {mean, {static_cast<char*>(mean.data) + bytes, mean.type, 1}};
}

struct FunctionalCall {
  Tensor running, batch;
  ForwardCall forward;
};

inline void check_rows(const Tensor& statistics, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == 2 && statistics.size(1) == input.size(1), "expected ",
                  name, " of shape [2, ", input.size(1), "]");
  STD_TORCH_CHECK(statistics.device() == input.device(), "expected ", name, " on the input's device");
}

inline FunctionalCall functional_call(const Tensor& input, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& running, const Tensor& mask,
                                      double eps, double p, const std::optional<Tensor>& residual,
                                      const Epilogue& epilogue) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input of shape [N, C, *]");
  check_rows(running, input, "running");
  const Tensor read = running.is_contiguous() ? running : torch::stable::contiguous(running);
  const Tensor batch = empty_statistics(input);
  // a momentum of 1 makes the updated statistics the batch's
  return {read, batch,
          forward_call(input, weight, bias, rows(read), rows(batch), mask, 1, eps, p, {}, residual, epilogue)};
}

inline BackwardCall backward_call(const Tensor& grad_output, const Tensor& input, const Tensor& statistics,
                                  const std::optional<Tensor>& weight, const Tensor& mask, double p,
                                  const std::optional<Tensor>& bias, const std::optional<Tensor>& signs,
                                  const Epilogue& epilogue) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input of shape [N, C, *]");
  const ScalarType sums = accumulation_type(input.scalar_type());
  float_type(input);
  check_like(grad_output, input, "grad_output");
  check_rows(statistics, input, "statistics");
  STD_TORCH_CHECK(statistics.scalar_type() == sums, "expected statistics in the accumulation dtype");
  if (signs) {
    STD_TORCH_CHECK(epilogue.keeps_signs(true) && is_piecewise(epilogue.activation),
                    "expected no signs with this activation");
    STD_TORCH_CHECK(signs->dim() == 1 && signs->size(0) == ceil_div(input.numel(), kSignsPerWord) &&
                        signs->scalar_type() == ScalarType::Int && signs->device() == input.device(),
                    "expected signs for every element, in int32 words on the input's device");
  }
  Tensor grad_input = dense_like(input);
  const Tensor dense = laid_out_as(input, grad_input);
  return {channel_view(dense, 1).value(),
          laid_out_as(grad_output, grad_input),
          dense,
          statistics.is_contiguous() ? statistics : torch::stable::contiguous(statistics),
          grad_input,
          empty_vector(input, input.size(1), sums),
          empty_vector(input, input.size(1), sums),
          signs ? std::optional<Tensor>(contiguous_vector(*signs)) : std::nullopt,
          signs ? empty_alike(grad_input, input.scalar_type()) : empty_vector(input, 0, input.scalar_type()),
          epilogue,
          channel_mask(mask, p, input),
          channel_vector(weight, input, "weight"),
          channel_vector(bias, input, "bias")};
}

// The operators of a kind of device: Kernels::forward(call) and Kernels::backward(call), while a Kernels::Guard of the
// device's index lives.
template <typename Kernels>
struct Operators {
  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& bias, const Tensor& running_mean,
                                                    const Tensor& running_var, const Tensor& mask, double momentum,
                                                    double eps, double p,
                                                    const std::optional<Tensor>& num_batches_tracked,
                                                    const std::optional<Tensor>& residual, int64_t activation,
                                                    double negative_slope) {
    const typename Kernels::Guard guard(input.get_device_index());
    const RunningStatistics running{channel_vector(running_mean, input, "running_mean"),
                                    channel_vector(running_var, input, "running_var")};
    const ForwardCall call = forward_call(input, weight, bias, running, running, mask, momentum, eps, p,
                                          num_batches_tracked, residual, epilogue(activation, negative_slope));
    Kernels::forward(call);
    return {call.output, call.statistics, call.signs};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> functional(const Tensor& input, const std::optional<Tensor>& weight,
                                                               const std::optional<Tensor>& bias, const Tensor& running,
                                                               const Tensor& mask, double eps, double p,
                                                               const std::optional<Tensor>& residual,
                                                               int64_t activation, double negative_slope) {
    const typename Kernels::Guard guard(input.get_device_index());
    const FunctionalCall call =
        functional_call(input, weight, bias, running, mask, eps, p, residual, epilogue(activation, negative_slope));
    Kernels::forward(call.forward);
    return {call.forward.output, call.forward.statistics, call.forward.signs, call.batch};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                             const Tensor& statistics,
                                                             const std::optional<Tensor>& weight, const Tensor& mask,
                                                             double p, const std::optional<Tensor>& bias,
                                                             const std::optional<Tensor>& signs, int64_t activation,
                                                             double negative_slope) {
    const typename Kernels::Guard guard(input.get_device_index());
    const BackwardCall call = backward_call(grad_output, input, statistics, weight, mask, p, bias, signs,
                                            epilogue(activation, negative_slope));
    Kernels::backward(call);
    return {call.grad_input, call.grad_weight, call.grad_bias, call.grad_residual};
  }
};

}  // namespace talib_fast
