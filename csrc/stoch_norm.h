// What the CPU and the CUDA kernel of stoch_norm share: operands, checked and brought into a form that both can walk.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "channel_vector.h"

namespace talib_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dense tensor seen as [outer, channels, inner], contiguous. channels_last has inner = 1.
struct ChannelView {
  int64_t outer, channels, inner;
  int64_t per_channel() const { return outer * inner; }
};

// The view of `tensor`, whatever the order of its dimensions in memory: a reduction over all of them but the channels
// does not care. None if the elements leave gaps or share memory.
inline std::optional<ChannelView> channel_view(const Tensor& tensor) {
  if (tensor.numel() == 0) return ChannelView{0, tensor.size(1), 1};
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<int64_t> order;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (sizes[dim] != 1) order.push_back(dim);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t elements = 1, inner = 1;
  bool channels_seen = sizes[1] == 1;
  for (const int64_t dim : order) {
    if (strides[dim] != elements) return std::nullopt;
    elements *= sizes[dim];
    if (dim == 1) channels_seen = true;
    if (!channels_seen) inner = elements;
  }
  return ChannelView{elements / (sizes[1] * inner), sizes[1], inner};
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

// `tensor` itself if it lies in memory as `like` does, else a copy that does
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  return torch::stable::copy_(copy, tensor);
}

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline FloatType float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FloatType::kFloat;
    case ScalarType::Double: return FloatType::kDouble;
    case ScalarType::Half: return FloatType::kHalf;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    default: STD_TORCH_CHECK(false, "expected a float16, bfloat16, float32 or float64 tensor");
  }
}

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

struct ForwardCall {
  ChannelView view;
  Tensor input, output, mean, invstd, mask;
  ChannelVector weight, bias, running_mean, running_var;
  double momentum, eps;
};

struct BackwardCall {
  ChannelView view;
  Tensor grad_output, input, mean, invstd, mask, grad_input, grad_weight, grad_bias;
  ChannelVector weight;
};

inline Tensor checked_mask(const Tensor& mask, const Tensor& input) {
  check_channels(mask, input, "mask");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "expected a bool mask");
  return torch::stable::contiguous(mask);
}

inline ForwardCall forward_call(const Tensor& input, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, const Tensor& running_mean,
                                const Tensor& running_var, const Tensor& mask, double momentum, double eps) {
  STD_TORCH_CHECK(input.dim() >= 2, "expected input of shape [N, C, *]");
  float_type(input);
  Tensor output = torch::stable::empty_like(input);
  const ScalarType sums = accumulation_type(input.scalar_type());
  const Tensor dense = laid_out_as(input, output);
  return {channel_view(dense).value(),
          dense,
          output,
          torch::stable::new_empty(input, {input.size(1)}, sums),
          torch::stable::new_empty(input, {input.size(1)}, sums),
          checked_mask(mask, input),
          channel_vector(weight, input, "weight"),
          channel_vector(bias, input, "bias"),
          channel_vector(running_mean, input, "running_mean"),
          channel_vector(running_var, input, "running_var"),
          momentum,
          eps};
}

inline BackwardCall backward_call(const Tensor& grad_output, const Tensor& input, const Tensor& mean,
                                  const Tensor& invstd, const std::optional<Tensor>& weight, const Tensor& mask) {
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
  Tensor grad_input = torch::stable::empty_like(input);
  const Tensor dense = laid_out_as(input, grad_input);
  return {channel_view(dense).value(),
          laid_out_as(grad_output, grad_input),
          dense,
          torch::stable::contiguous(mean),
          torch::stable::contiguous(invstd),
          checked_mask(mask, input),
          grad_input,
          torch::stable::new_empty(mean, {input.size(1)}),
          torch::stable::new_empty(mean, {input.size(1)}),
          channel_vector(weight, input, "weight")};
}

}  // namespace talib_fast
