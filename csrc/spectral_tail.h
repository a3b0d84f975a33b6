// What the CPU and the CUDA kernels of spectral_tail share: their arguments, checked, and what they return.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>

#include "operands.h"

namespace talib_fast {

inline Matrices matrices(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 || tensor.dim() == 3, "expected matrices of shape [b, f] or [count, b, f]");
  const bool several = tensor.dim() == 3;
  int64_t row = tensor.dim() - 2, column = row + 1;
  if (tensor.size(row) > tensor.size(column)) std::swap(row, column);
  return {several ? tensor.size(0) : 1,   tensor.size(row),   tensor.size(column),
          several ? tensor.stride(0) : 0, tensor.stride(row), tensor.stride(column)};
}

// Whether the directions of the tail's complement are looked for: they are, where they are fewer.
inline bool uses_complement(const Matrices& shape, int64_t k) { return 2 * k > shape.m; }
inline int64_t vector_count(const Matrices& shape, int64_t k) { return std::min(k, shape.m - k); }

// What the forward pass of one tensor of matrices takes and gives.
struct TailCall {
  Tensor input;
  Matrices matrices;
  int64_t k;
  Tensor value;    // [] or [count], of the accumulation dtype
  Tensor vectors;  // [m, vector_count] or [count, m, vector_count], double, contiguous
};

inline TailCall tail_call(const Tensor& input, int64_t k) {
  float_type(input);
  TailCall call{input, matrices(input), k, {}, {}};
  STD_TORCH_CHECK(k >= 0 && k <= call.matrices.m, "expected 0 <= k <= min(b, f)");
  const int64_t rows = call.matrices.m, columns = vector_count(call.matrices, k), row = std::max<int64_t>(columns, 1);
  const int64_t sizes[] = {call.matrices.count, rows, columns}, strides[] = {std::max<int64_t>(rows, 1) * row, row, 1};
  const int64_t dims = input.dim(), absent = 3 - dims;  // without a count
  call.value = empty_strided(input, dims - 2, sizes, strides + 2, accumulation_type(input.scalar_type()));
  call.vectors = empty_strided(input, dims, sizes + absent, strides + absent, ScalarType::Double);
  return call;
}

// What its backward pass takes and gives.
struct TailGradientCall {
  Tensor grad;  // [] or [count], of the accumulation dtype, contiguous
  Tensor input;
  Tensor vectors;  // as above
  Matrices matrices;
  int64_t k;
  Tensor gradient;
};

inline TailGradientCall tail_gradient_call(const Tensor& grad, const Tensor& input, const Tensor& vectors, int64_t k) {
  float_type(input);
  const ScalarType sums = accumulation_type(input.scalar_type());
  const Matrices shape = matrices(input);
  STD_TORCH_CHECK(k >= 0 && k <= shape.m, "expected 0 <= k <= min(b, f)");
  STD_TORCH_CHECK(vectors.dim() == input.dim() && vectors.size(vectors.dim() - 2) == shape.m &&
                      vectors.size(vectors.dim() - 1) == vector_count(shape, k) &&
                      vectors.scalar_type() == ScalarType::Double && vectors.device() == input.device() &&
                      (input.dim() == 2 || vectors.size(0) == shape.count),
                  "expected the vectors that the forward pass gave");
  STD_TORCH_CHECK(grad.numel() == shape.count && grad.device() == input.device(),
                  "expected one number of grad per matrix, on the input's device");
  return {torch::stable::contiguous(torch::stable::to(grad, sums)),
          input,
          torch::stable::contiguous(vectors),
          shape,
          k,
          dense_like(input)};
}

inline std::vector<TailCall> tail_calls(const std::vector<Tensor>& inputs, const std::vector<int64_t>& k) {
  STD_TORCH_CHECK(!inputs.empty() && inputs.size() == k.size(), "expected one k per input, and at least one input");
  std::vector<TailCall> calls;
  for (size_t i = 0; i < inputs.size(); ++i) {
    STD_TORCH_CHECK(inputs[i].device() == inputs[0].device(), "expected all inputs on one device");
    calls.push_back(tail_call(inputs[i], k[i]));
  }
  return calls;
}

inline std::vector<TailGradientCall> tail_gradient_calls(const std::vector<Tensor>& grads,
                                                         const std::vector<Tensor>& inputs,
                                                         const std::vector<Tensor>& vectors,
                                                         const std::vector<int64_t>& k) {
  STD_TORCH_CHECK(
      !inputs.empty() && grads.size() == inputs.size() && vectors.size() == inputs.size() && k.size() == inputs.size(),
      "expected a gradient, the vectors and k for every input, and at least one input");
  std::vector<TailGradientCall> calls;
  for (size_t i = 0; i < inputs.size(); ++i) {
    STD_TORCH_CHECK(inputs[i].device() == inputs[0].device(), "expected all inputs on one device");
    calls.push_back(tail_gradient_call(grads[i], inputs[i], vectors[i], k[i]));
  }
  return calls;
}

inline std::tuple<std::vector<Tensor>, std::vector<Tensor>> results(const std::vector<TailCall>& calls) {
  std::vector<Tensor> values, vectors;
  for (const TailCall& call : calls) values.push_back(call.value), vectors.push_back(call.vectors);
  return {values, vectors};
}

inline std::vector<Tensor> results(const std::vector<TailGradientCall>& calls) {
  std::vector<Tensor> gradients;
  for (const TailGradientCall& call : calls) gradients.push_back(call.gradient);
  return gradients;
}

}  // namespace talib_fast
