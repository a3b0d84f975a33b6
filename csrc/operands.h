// What the CPU and the CUDA kernels need of torch's tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "types.h"

namespace talib_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dense tensor seen as [outer, channels, inner], contiguous. channels_last has inner = 1.
struct ChannelView {
  int64_t outer, channels, inner;
  int64_t per_channel() const { return outer * inner; }
};

// The dimensions longer than one, as memory has them: slowest first. None if the elements leave gaps or share memory.
inline std::optional<std::vector<int64_t>> memory_order(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<int64_t> order;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (sizes[dim] != 1) order.push_back(dim);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  int64_t elements = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); elements *= sizes[*dim++])
    if (strides[*dim] != elements) return std::nullopt;
  return order;
}

// New tensors, straight from torch's allocator: the dispatcher's search for an operator by its name takes longer than a
// kernel on a small tensor.
inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                            ScalarType type) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(type), device_type,
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType type) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &size, &stride, type);
}

inline Tensor dense_like(const Tensor& tensor) {
  if (!memory_order(tensor)) return torch::stable::empty_like(tensor);
  return empty_strided(tensor, tensor.dim(), tensor.sizes().data(), tensor.strides().data(), tensor.scalar_type());
}

inline Tensor contiguous_vector(const Tensor& vector) {
  return vector.stride(0) == 1 ? vector : torch::stable::contiguous(vector);
}

// How the order of `other` differs from that of `tensor`, which has its shape. None if by more than an exchange.
inline std::optional<Exchange> exchange(const Tensor& tensor, const Tensor& other) {
  const auto here = memory_order(tensor), there = memory_order(other);
  if (!here || !there) return std::nullopt;
  const auto [begin, other_begin] = std::mismatch(here->begin(), here->end(), there->begin());
  if (begin == here->end()) return Exchange{};
  const auto [end, other_end] = std::mismatch(here->rbegin(), here->rend(), there->rbegin());
  const auto middle = std::find(begin, end.base(), *other_begin);
  std::vector<int64_t> rotated(middle, end.base());
  rotated.insert(rotated.end(), begin, middle);
  if (!std::equal(rotated.begin(), rotated.end(), other_begin)) return std::nullopt;
  const auto elements = [&](auto first, auto last) {
    int64_t product = 1;
    for (; first != last; ++first) product *= tensor.size(*first);
    return product;
  };
  return Exchange{elements(begin, middle), elements(middle, end.base()), elements(end.base(), here->end())};
}

// The view of `tensor` with its channels along `channel_dim`, whatever the order of its dimensions in memory: a reduction
// over all but the channels does not care. None if the elements leave gaps or share memory.
inline std::optional<ChannelView> channel_view(const Tensor& tensor, int64_t channel_dim) {
  const int64_t channels = tensor.size(channel_dim);
  if (tensor.numel() == 0) return ChannelView{0, channels, 1};
  const auto order = memory_order(tensor);
  if (!order) return std::nullopt;
  int64_t inner = 1;
  if (channels != 1)
    for (auto dim = order->rbegin(); *dim != channel_dim; ++dim) inner *= tensor.size(*dim);
  return ChannelView{tensor.numel() / (channels * inner), channels, inner};
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  return true;
}

// `tensor` itself if it lies in memory as `like` does, else a copy that does
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = dense_like(like);
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

}  // namespace talib_fast
