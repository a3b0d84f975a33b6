// Compiled by nvcc this registers the kernels for CUDA; by g++, with the harness of tests/simt, the same ones for CPU.
#include "squared_distance.cuh"

#include <tuple>
#include <vector>

#include "../squared_distance.h"
#include "counters.cuh"
#include "registration.h"
#include "stream.h"

namespace talib_fast {
namespace {

using namespace squared_distance;

Operand make_operand(const Term& term) {
  Operand operand{};
  operand.target = term.target.const_data_ptr();
  if (term.weight) operand.weight = term.weight->const_data_ptr();
  if (term.gradient) operand.gradient = term.gradient->mutable_data_ptr();
  operand.elements = term.target.numel();
  operand.channels = term.view.channels, operand.inner = term.view.inner;
  operand.exchange = term.exchange;
  operand.type = static_cast<uint8_t>(float_type(term.target));
  constexpr uintptr_t kVectorBytes = 16;
  operand.vectors =
      (reinterpret_cast<uintptr_t>(operand.target) | reinterpret_cast<uintptr_t>(operand.gradient)) % kVectorBytes == 0;
  int64_t bytes = term.target.element_size();
  if (term.source) {
    bytes += term.source->element_size();
    operand.source = term.source->const_data_ptr();
    operand.source_type = static_cast<uint8_t>(float_type(*term.source));
    // a narrower source's vectors have fewer bytes
    const uintptr_t vector_bytes = kVectorBytes * term.source->element_size() / term.target.element_size();
    operand.vectors &= reinterpret_cast<uintptr_t>(operand.source) % std::min(vector_bytes, kVectorBytes) == 0;
  }
  while ((1 << operand.bytes_log2) < bytes) ++operand.bytes_log2;
  return operand;
}

std::vector<Operand> make_operands(const std::vector<Term>& terms) {
  std::vector<Operand> operands;
  operands.reserve(terms.size());
  for (const Term& term : terms) operands.push_back(make_operand(term));
  return operands;
}

std::tuple<Tensor, Tensor> squared_distance_forward(const std::vector<Tensor>& targets,
                                                    const std::vector<Tensor>& sources,
                                                    const std::vector<Tensor>& weights, int64_t channel_dim) {
  STD_TORCH_CHECK(!targets.empty(), "expected at least one target");
  const DeviceGuard guard(targets[0].get_device_index());
  const std::vector<Term> terms = make_terms(targets, sources, weights, channel_dim, false);
  std::vector<Operand> operands = make_operands(terms);
  const std::vector<Launch> launches = plan(operands, current_device().multiprocessors);
  const ScalarType type = result_type(targets);
  const Tensor total = empty_number(targets[0], type);
  const Tensor values = empty_vector(targets[0], static_cast<int64_t>(terms.size()), type);

  int64_t blocks = 0;
  for (const Launch& launch : launches) blocks += launch.blocks;
  const cudaStream_t stream = current_stream(targets[0]);
  const Scratch workspace(targets[0], blocks * static_cast<int64_t>(sizeof(double)));
  const Counters counters(targets[0], static_cast<int64_t>(operands.size() + launches.size()), stream);
  Results results{reinterpret_cast<double*>(workspace.data()),
                  counters.data(),
                  nullptr,
                  values.mutable_data_ptr(),
                  0,
                  0,
                  type == ScalarType::Double};
  for (const Launch& launch : launches) {
    results.first_term = launch.first;
    if (&launch == &launches.back()) results.total = total.mutable_data_ptr();
    launch_forward(launch, results, stream);
    results.first_chunk += launch.blocks, results.arrived += launch.count + 1;
  }
  return {total, values};
}

std::vector<Tensor> squared_distance_backward(const Tensor& grad, const std::vector<Tensor>& targets,
                                              const std::vector<Tensor>& sources, const std::vector<Tensor>& weights,
                                              int64_t channel_dim) {
  if (targets.empty()) return {};
  const DeviceGuard guard(targets[0].get_device_index());
  const Tensor factor = checked_grad(grad, targets[0]);
  const std::vector<Term> terms = make_terms(targets, sources, weights, channel_dim, true);
  std::vector<Operand> operands = make_operands(terms);
  for (const Launch& launch : plan(operands, current_device().multiprocessors))
    launch_backward(launch, factor.const_data_ptr(), factor.scalar_type() == ScalarType::Double,
                    current_stream(targets[0]));
  return gradients(terms);
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, TALIB_FAST_KERNEL_DEVICE, m) {
  talib_fast::register_kernel<"squared_distance_forward", &talib_fast::squared_distance_forward>(m);
  talib_fast::register_kernel<"squared_distance_backward", &talib_fast::squared_distance_backward>(m);
}
