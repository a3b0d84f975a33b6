// What the CPU and the CUDA kernel of squared_distance share: the operands, checked and in the form that both kernels
// read.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "operands.h"

namespace talib_fast {

// One term of the sum, target and source dense.
struct Term {
  ChannelView view;  // without a weight one channel of all elements
  Tensor target;
  std::optional<Tensor> source;    // of a dtype that makes a pair with the target's
  Exchange exchange;               // how the source's order in memory differs from the target's
  std::optional<Tensor> weight;    // [channels], contiguous, of the accumulation dtype
  std::optional<Tensor> gradient;  // of the target's dtype; the forward pass has none
};

// `tensor` in that dtype, itself if it has it
inline Tensor of_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// What a source is read as beside that target: its own dtype where they are a pair, else the accumulation dtype.
inline ScalarType source_type(const Tensor& target, const Tensor& source) {
  const bool is_pair = with_pair<c10::Half, c10::BFloat16>(float_type(target), float_type(source), [](auto, auto) {});
  return is_pair ? source.scalar_type() : accumulation_type(target.scalar_type());
}

inline Term make_term(const Tensor& target, const Tensor* source, const Tensor* weight, int64_t channel_dim,
                      bool with_gradient) {
  float_type(target);
  const ScalarType sums = accumulation_type(target.scalar_type());
  Term term{{1, 1, target.numel()}, target, {}, {}, {}, {}};
  const bool empty = target.numel() == 0, dense = memory_order(target).has_value();
  if (with_gradient) term.gradient = dense ? empty_alike(target, target.scalar_type()) : dense_like(target);
  if (!dense && !empty) term.target = laid_out_as(target, with_gradient ? *term.gradient : dense_like(target));
  if (source != nullptr) {
    STD_TORCH_CHECK(source->device() == target.device(), "expected a source on its target's device");
    STD_TORCH_CHECK(source->dim() == target.dim(), "expected a source of its target's shape");
    const auto sizes = target.sizes(), source_sizes = source->sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), source_sizes.begin()),
                    "expected a source of its target's shape");
    const ScalarType type = source_type(target, *source);
    const auto found = empty ? Exchange{} : exchange(term.target, *source);
    if (found) term.exchange = *found, term.source = of_type(*source, type);  // which keeps the order
    else term.source = laid_out_as(*source, term.target, type);
  }
  if (weight == nullptr) return term;
  if (channel_dim < 0) channel_dim += target.dim();
  STD_TORCH_CHECK(channel_dim >= 0 && channel_dim < target.dim(), "expected a channel_dim that the target has");
  STD_TORCH_CHECK(weight->device() == target.device(), "expected a weight on its target's device");
  STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == target.size(channel_dim),
                  "expected a weight with one value per channel");
  float_type(*weight);
  term.weight = torch::stable::contiguous(of_type(*weight, sums));
  term.view = channel_view(term.target, channel_dim).value();
  return term;
}

inline std::vector<Term> make_terms(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
                                    const std::vector<Tensor>& weights, int64_t channel_dim, bool with_gradient) {
  STD_TORCH_CHECK(!targets.empty(), "expected at least one target");
  STD_TORCH_CHECK(sources.empty() || sources.size() == targets.size(), "expected one source per target, or none");
  STD_TORCH_CHECK(weights.empty() || weights.size() == targets.size(), "expected one weight per target, or none");
  std::vector<Term> terms;
  terms.reserve(targets.size());
  for (size_t j = 0; j < targets.size(); ++j) {
    STD_TORCH_CHECK(targets[j].device() == targets[0].device(), "expected all targets on one device");
    terms.push_back(make_term(targets[j], sources.empty() ? nullptr : &sources[j],
                              weights.empty() ? nullptr : &weights[j], channel_dim, with_gradient));
  }
  return terms;
}

inline std::vector<Tensor> gradients(const std::vector<Term>& terms) {
  std::vector<Tensor> tensors;
  tensors.reserve(terms.size());
  for (const Term& term : terms) tensors.push_back(*term.gradient);
  return tensors;
}

inline ScalarType result_type(const std::vector<Tensor>& targets) {
  for (const Tensor& target : targets)
    if (target.scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

// The factor of all gradients, as float or double.
inline Tensor checked_grad(const Tensor& grad, const Tensor& target) {
  STD_TORCH_CHECK(grad.numel() == 1 && grad.device() == target.device(),
                  "expected grad to be one number on the targets' device");
  return of_type(grad, accumulation_type(grad.scalar_type()));
}

}  // namespace talib_fast
