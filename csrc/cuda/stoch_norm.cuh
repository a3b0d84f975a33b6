// Stochastic normalisation on the GPU. A first pass takes two sums for each channel and derives constants from them; a
// second pass writes with the constants. In runs, a channel on running statistics is written in the first pass. One
// launch does both passes, in one of two schedules:
//
// resident: a block takes a whole group of channels, and keeps what it read in shared memory between the passes.
// sliced:   many blocks share a group. They take items off one list, on which the second pass over a group follows
//           the first one so closely that it should read from the L2 cache. Nothing waits for the host.
//
// The kernels with kFused also apply what follows the norm, an activation and a residual. It costs the others nothing.
//
// All sums are reduced in an order that depends on shapes and launch parameters only: equal input gives equal bits.
#pragma once

#include "stoch_norm/kernels.cuh"
#include "stoch_norm/plan.cuh"

#include <cstdint>
#include <numeric>

namespace talib_fast::stoch_norm {

template <typename Op, int V, bool kRows>
void launch(const Op& op, const Plan& plan, const Device& device, void* memory, unsigned* counters,
            cudaStream_t stream) {
  const Geometry& g = plan.geometry;
  if constexpr (Op::kWritesSigns)
    if (op.signs != nullptr && !g.whole_words) {
      const int64_t elements = g.steps * (kRows ? g.row : g.channels * V);
      check(cudaMemsetAsync(op.signs, 0, sizeof(unsigned) * ceil_div(elements, kSignsPerWord), stream),
            "cudaMemsetAsync");
    }
  if (plan.resident) {
    allow_shared_bytes(resident_kernel<Op, V, kRows>, static_cast<int64_t>(plan.shared_bytes), device);
    SIMT_LAUNCH((resident_kernel<Op, V, kRows>), dim3(plan.blocks), dim3(plan.threads), plan.shared_bytes, stream, op,
                g);
    return;
  }
  Workspace<Op> workspace;
  workspace.constants = static_cast<typename Op::K*>(memory);
  workspace.slices = reinterpret_cast<typename Op::Sums*>(workspace.constants + int64_t{g.groups} * g.group_channels);
  workspace.sections = workspace.slices + int64_t{g.groups} * g.slices * g.group_channels;
  workspace.next_ticket = counters;
  workspace.arrived = counters + 1;
  workspace.arrived_sections = workspace.arrived + g.groups;
  SIMT_LAUNCH((sliced_kernel<Op, V, kRows>), dim3(plan.blocks), dim3(plan.threads), plan.shared_bytes, stream, op, g,
              workspace, plan.lag);
}

// Calls f(integral_constant<V>, bool_constant<kRows>) for the widest vectors that the shape and the addresses allow.
// With kFused float64 goes element by element, because its exponential functions are long.
template <typename Op, typename F>
void with_vectors(const Op& op, const Shape& shape, const Device& device, const F& f) {
  using T = typename Op::Element;
  constexpr int kWidest = sizeof(T) < 8 ? 16 / sizeof(T) : Op::kFused ? 1 : 2;
  const auto is_aligned = [&](int64_t bytes) {
    const auto aligned = [&](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
    bool beside;
    if constexpr (Op::kTensors == 1) beside = aligned(op.residual);
    else beside = aligned(op.dy) && aligned(op.dz);
    return aligned(op.x) && aligned(op.out) && beside;
  };
  // Returns whether f was called. In rows of runs a block has to hold all columns up to one where a vector and a
  // channel end together.
  const auto call = [&](auto vector) {
    constexpr int V = vector();
    if (!is_aligned(V * sizeof(T))) return false;
    const int64_t common = std::gcd<int64_t>(shape.inner, V);
    if (shape.inner == 1 && shape.channels % V == 0) f(vector, std::true_type{});
    else if (common == V) f(vector, std::false_type{});
    else if (shape.inner >= V && shape.channels % (V / common) == 0 && shape.inner / common <= few_threads(device))
      f(vector, std::true_type{});
    else return false;
    return true;
  };
  if (call(std::integral_constant<int, kWidest>{})) return;
  if constexpr (kWidest == 8)
    if (call(std::integral_constant<int, 4>{})) return;
  if constexpr (kWidest > 1) call(std::integral_constant<int, 1>{});
}

}  // namespace talib_fast::stoch_norm
