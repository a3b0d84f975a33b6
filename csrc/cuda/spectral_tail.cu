// Compiled by nvcc this registers the kernels for CUDA; by g++, with the harness of tests/simt, the same ones for CPU.
#include "spectral_tail.cuh"

#include <array>

#include "../spectral_tail.h"
#include "registration.h"
#include "stream.h"

namespace talib_fast {
namespace {

using namespace spectral_tail;

std::tuple<std::vector<Tensor>, std::vector<Tensor>> spectral_tail_forward(const std::vector<Tensor>& inputs,
                                                                           const std::vector<int64_t>& k) {
  std::vector<TailCall> calls = tail_calls(inputs, k);
  const DeviceGuard guard(inputs[0].get_device_index());
  const cudaStream_t stream = current_stream(inputs[0]);
  std::vector<Operand> operands;
  for (TailCall& tail : calls) {
    if (tail.matrices.count == 0) continue;
    if (tail.k == 0) {
      const size_t bytes = tail.value.numel() * tail.value.element_size();
      check(cudaMemsetAsync(tail.value.mutable_data_ptr(), 0, bytes, stream), "cudaMemsetAsync");
    } else if (tail.matrices.m > kMostRows) {
      const auto [value, vectors] =
          call_operator<std::tuple<Tensor, Tensor>>("talib_fast::spectral_tail_linalg_forward", tail.input, tail.k);
      tail.value = value, tail.vectors = vectors;
    } else {
      Operand operand{};
      operand.input = tail.input.const_data_ptr();
      operand.vectors = static_cast<double*>(tail.vectors.mutable_data_ptr());
      operand.value = tail.value.mutable_data_ptr();
      operand.matrices = tail.matrices;
      operand.directions = static_cast<int>(vector_count(tail.matrices, tail.k));
      operand.complement = uses_complement(tail.matrices, tail.k);
      operand.type = float_type(tail.input);
      operands.push_back(operand);
    }
  }
  if (operands.empty()) return results(calls);
  const Device device = current_device();
  Workspace workspace;
  const auto plan = [&] {
    for (Operand& operand : operands) plan_forward(operand, operands.size(), device, workspace);
  };
  plan();
  const Scratch memory(inputs[0], workspace.bytes);
  workspace = {memory.data(), 0};
  plan();
  launch_forward(operands, device, stream);
  return results(calls);
}

std::vector<Tensor> spectral_tail_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& inputs,
                                           const std::vector<Tensor>& vectors, const std::vector<int64_t>& k) {
  if (inputs.empty()) return {};
  std::vector<TailGradientCall> calls = tail_gradient_calls(grads, inputs, vectors, k);
  const DeviceGuard guard(inputs[0].get_device_index());
  std::vector<Operand> operands;
  for (TailGradientCall& tail : calls) {
    if (tail.input.numel() == 0) continue;
    if (tail.matrices.m > kMostRows) {
      tail.gradient = call_operator<Tensor>("talib_fast::spectral_tail_linalg_backward", tail.grad, tail.input,
                                            tail.vectors, tail.k);
      continue;
    }
    Operand operand{};
    operand.input = tail.input.const_data_ptr();
    operand.gradient = tail.gradient.mutable_data_ptr();
    operand.vectors = static_cast<double*>(tail.vectors.mutable_data_ptr());
    operand.value = tail.grad.mutable_data_ptr();
    operand.matrices = tail.matrices, operand.gradients = matrices(tail.gradient);
    operand.directions = static_cast<int>(vector_count(tail.matrices, tail.k));
    operand.complement = uses_complement(tail.matrices, tail.k);
    operand.type = float_type(tail.input);
    choose_columns(operand);
    operands.push_back(operand);
  }
  launch_backward(operands, current_stream(inputs[0]));
  return results(calls);
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, TALIB_FAST_KERNEL_DEVICE, m) {
  talib_fast::register_kernel<"spectral_tail_forward", &talib_fast::spectral_tail_forward>(m);
  talib_fast::register_kernel<"spectral_tail_backward", &talib_fast::spectral_tail_backward>(m);
}
