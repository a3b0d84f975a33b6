// What the CPU and the CUDA kernel of stoch_norm share: operands, checked and brought into a form that both can walk.
#pragma once

#include <tuple>

#include "operands.h"

namespace talib_fast {

inline void check_channels(const Tensor& vector, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == input.size(1), "expected ", name, " of shape [",
                  input.size(1), "]");
  STD_TORCH_CHECK(vector.device() == input.device(), "expected ", name, " on the input's device");
}

inline ChannelVector channel_vector(const Tensor& vector, const Tensor& input, const char* name) {
  check_channels(vector, input, name);
  return {vector.data_ptr(), float_type(vector), vector.stride(0)};
}

inline ChannelVector channel_vector(const std::optional<Tensor>& vector, const Tensor& input, const char* name) {
  return vector ? channel_vector(*vector, input, name) : ChannelVector{};
}

// With what it reads kept alive, which may be a copy.
struct Mask {
  Tensor values;
  ChannelMask channels;
};

struct RunningStatistics {
  ChannelVector mean, var;
};

struct ForwardCall {
  ChannelView view;
  Tensor input, output, mean, invstd;
  Mask mask;
  ChannelVector weight, bias;
  RunningStatistics running, moved;  // moved: the running ones again, or where their moved values go instead
  int64_t* batches;  // to count this one; null: there is no counter, or nothing to count
  double momentum, eps;
};

struct BackwardCall {
  ChannelView view;
  Tensor grad_output, input, mean, invstd, grad_input, grad_weight, grad_bias;
  Mask mask;
  ChannelVector weight;
};

inline Mask channel_mask(const Tensor& mask, double p, const Tensor& input) {
  check_channels(mask, input, "mask");
  const bool drawn = mask.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(drawn || mask.scalar_type() == ScalarType::Bool, "expected a bool or float32 mask");
  const Tensor values = contiguous_vector(mask);
  const void* data = values.const_data_ptr();
  return {values, {drawn ? static_cast<const float*>(data) : nullptr, drawn ? nullptr : static_cast<const bool*>(data),
                   static_cast<float>(p)}};
}

inline int64_t* counter(const std::optional<Tensor>& batches, const Tensor& input) {
  if (!batches || input.numel() == 0) return nullptr;
  STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1,
                  "expected one int64 in num_batches_tracked");
  STD_TORCH_CHECK(batches->device() == input.device(), "expected num_batches_tracked on the input's device");
  return static_cast<int64_t*>(batches->mutable_data_ptr());
}

inline ForwardCall forward_call(const Tensor& input, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, const RunningStatistics& running,
                                const RunningStatistics& moved, const Tensor& mask, double momentum, double eps,
                                double p, const std::optional<Tensor>& num_batches_tracked) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input of shape [N, C, *]");
  float_type(input);
  Tensor output = dense_like(input);
  const ScalarType sums = accumulation_type(input.scalar_type());
  const Tensor dense = laid_out_as(input, output);
  return {channel_view(dense, 1).value(),
          dense,
          output,
          empty_vector(input, input.size(1), sums),
          empty_vector(input, input.size(1), sums),
          channel_mask(mask, p, input),
          channel_vector(weight, input, "weight"),
          channel_vector(bias, input, "bias"),
          running,
          moved,
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

inline FunctionalCall functional_call(const Tensor& input, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& running, const Tensor& mask,
                                      double eps, double p) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input of shape [N, C, *]");
  const int64_t sizes[] = {2, input.size(1)}, strides[] = {input.size(1), 1};
  STD_TORCH_CHECK(running.dim() == 2 && running.size(0) == 2 && running.size(1) == input.size(1),
                  "expected running of shape [2, ", input.size(1), "]");
  STD_TORCH_CHECK(running.device() == input.device(), "expected running on the input's device");
  const Tensor read = running.is_contiguous() ? running : torch::stable::contiguous(running);
  const Tensor batch = empty_strided(input, 2, sizes, strides, accumulation_type(input.scalar_type()));
  // a momentum of 1 makes the moved statistics the batch's
  return {read, batch, forward_call(input, weight, bias, rows(read), rows(batch), mask, 1, eps, p, {})};
}

inline BackwardCall backward_call(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                  const Tensor& invstd, const std::optional<Tensor>& weight, const Tensor& mask,
                                  double p) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input of shape [N, C, *]");
  float_type(input);
  STD_TORCH_CHECK(grad_output.dim() == input.dim() && grad_output.scalar_type() == input.scalar_type() &&
                      grad_output.device() == input.device(),
                  "expected grad_output of the input's shape, dtype and device");
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    STD_TORCH_CHECK(grad_output.size(dim) == input.size(dim), "expected grad_output of the input's shape");
  const ScalarType sums = accumulation_type(input.scalar_type());
  for (const Tensor* statistic : {&mean, &invstd}) {
    check_channels(*statistic, input, "mean and invstd");
    STD_TORCH_CHECK(statistic->scalar_type() == sums, "expected mean and invstd in the accumulation dtype");
  }
  Tensor grad_input = dense_like(input);
  const Tensor dense = laid_out_as(input, grad_input);
  return {channel_view(dense, 1).value(),
          laid_out_as(grad_output, grad_input),
          dense,
          contiguous_vector(mean),
          contiguous_vector(invstd),
          grad_input,
          empty_vector(input, input.size(1), sums),
          empty_vector(input, input.size(1), sums),
          channel_mask(mask, p, input),
          channel_vector(weight, input, "weight")};
}

}  // namespace talib_fast
