// What the CPU and the CUDA kernels need of torch's tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
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

// Some dimensions of a tensor, in some order. They are in an array, because allocations would take most of the time on
// lists of small tensors.
class Order {
 public:
  const int16_t* begin() const { return dims_; }
  const int16_t* end() const { return dims_ + count_; }
  auto rbegin() const { return std::make_reverse_iterator(end()); }
  auto rend() const { return std::make_reverse_iterator(begin()); }

  // inserts `dim` before the last ones for which smaller(one of them, dim) holds
  template <typename F>
  void insert(int64_t dim, const F& smaller) {
    STD_TORCH_CHECK(count_ < kMost, "expected at most ", kMost, " dimensions longer than one");
    int at = count_++;
    for (; at > 0 && smaller(dims_[at - 1], dim); --at) dims_[at] = dims_[at - 1];
    dims_[at] = static_cast<int16_t>(dim);
  }

 private:
  static constexpr int kMost = 64;  // 2^64 elements
  int16_t dims_[kMost];
  int count_ = 0;
};

// The dimensions longer than one, as memory has them: slowest first. None if the elements leave gaps or share memory.
inline std::optional<Order> memory_order(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  Order order;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (sizes[dim] != 1) order.insert(dim, [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
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

inline Tensor empty_number(const Tensor& like, ScalarType type) {
  return empty_strided(like, 0, nullptr, nullptr, type);
}

// of the same sizes and strides, which leave no gaps
inline Tensor empty_alike(const Tensor& tensor, ScalarType type) {
  return empty_strided(tensor, tensor.dim(), tensor.sizes().data(), tensor.strides().data(), type);
}

inline Tensor dense_like(const Tensor& tensor) {
  return memory_order(tensor) ? empty_alike(tensor, tensor.scalar_type()) : torch::stable::empty_like(tensor);
}

// Memory that a kernel needs beside its results.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t bytes) {
    if (bytes != 0) memory_ = empty_vector(like, bytes, ScalarType::Byte);
  }
  char* data() const { return memory_ ? static_cast<char*>(memory_->mutable_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> memory_;
};

inline Tensor contiguous_vector(const Tensor& vector) {
  return vector.stride(0) == 1 ? vector : torch::stable::contiguous(vector);
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), b_strides = b.strides();
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (sizes[dim] != 1 && strides[dim] != b_strides[dim]) return false;
  return true;
}

// How the order of `other` differs from that of `tensor`, which is dense and of its shape. None if by more than an
// exchange.
inline std::optional<Exchange> exchange(const Tensor& tensor, const Tensor& other) {
  if (same_strides(tensor, other)) return Exchange{};
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

// The view of `tensor` with its channels along `channel_dim`, whatever the order of its dimensions in memory: a
// reduction over all but the channels does not care. None if the elements leave gaps or share memory.
inline std::optional<ChannelView> channel_view(const Tensor& tensor, int64_t channel_dim) {
  const int64_t channels = tensor.size(channel_dim);
  const int64_t elements = tensor.numel();
  if (elements == 0) return ChannelView{0, channels, 1};
  const auto order = memory_order(tensor);
  if (!order) return std::nullopt;
  if (channels == 1) return ChannelView{1, 1, elements};  // one long run
  const auto sizes = tensor.sizes();
  int64_t inner = 1;
  for (auto dim = order->rbegin(); *dim != channel_dim; ++dim) inner *= sizes[*dim];
  return ChannelView{elements / (channels * inner), channels, inner};
}

// `tensor` itself if it has that dtype and lies in memory as `like` does, which is dense; else a copy that does
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like, ScalarType type) {
  if (tensor.scalar_type() == type && same_strides(tensor, like)) return tensor;
  Tensor copy = empty_alike(like, type);
  return torch::stable::copy_(copy, tensor);
}
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& like) {
  return laid_out_as(tensor, like, tensor.scalar_type());
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
