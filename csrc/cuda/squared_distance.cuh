// Half squared distances over a list of tensors on the GPU, and their gradients. One launch serves the whole list,
// which travels in the launch's parameters. Every block takes one chunk of one tensor. The last block of a tensor to
// arrive adds up the tensor's chunks, and the last block of all adds up all chunks. All sums are reduced in an order
// that depends on shapes and launch parameters only: equal input gives equal bits.
#pragma once

#include "runtime.cuh"
#include "squared_distance/operand.cuh"
#include "squared_distance/plan.cuh"
#include "squared_distance/worker.cuh"

#include <cstdint>
#include <type_traits>

namespace talib_fast::squared_distance {

struct Chunk {
  int j;  // of operand j
  int64_t begin, end;
};

// The chunk of this block. It is returned, because a lambda that takes it would be too long for nvcc to inline.
template <int kOperands>
__device__ __forceinline__ Chunk find_chunk(const List<kOperands>& list) {
  const unsigned stretch = blockIdx.x >> list.stretch_log2;
  const int j = operand_index(list, list.first_operands[stretch], list.first_operands[stretch + 1] + 1);
  const Operand& operand = list.operands[j];
  const int64_t elements = list.chunk_bytes >> operand.bytes_log2;
  const int64_t begin = (blockIdx.x - operand.first_block) * elements, rest = operand.elements - begin;
  return {j, begin, begin + (rest < elements ? rest : elements)};
}

// What the blocks of the forward pass found, and where the results go.
struct Results {
  double* chunks;        // [blocks of all launches]
  unsigned* arrived;     // [operands of this launch + 1]: blocks that arrived, the last one of all; 0 before and after
  void* total;           // double where wide, else float; null: a later launch completes it
  void* terms;           // [terms], likewise
  int first_term;        // of this launch
  unsigned first_chunk;  // likewise
  bool wide;
};

__device__ __forceinline__ double read(const void* values, bool wide, int i) {
  return wide ? static_cast<const double*>(values)[i] : static_cast<const float*>(values)[i];
}

__device__ __forceinline__ void write(void* values, bool wide, int i, double value) {
  if (wide) static_cast<double*>(values)[i] = value;
  else static_cast<float*>(values)[i] = static_cast<float>(value);
}

// This thread's share of the sum of all chunks, and of that of [begin, end) among them. Whether it is asked for all
// chunks or for those alone, a thread has the same ones and adds them up in the same order. It loads many before it
// uses one.
struct Sums {
  double all = 0, own = 0;

  __device__ __forceinline__ void add(const double* chunks, unsigned first, unsigned last, unsigned begin,
                                      unsigned end) {
    constexpr unsigned kLoads = 16;
    for (unsigned at = first / kThreads * kThreads + threadIdx.x; at < last; at += kLoads * kThreads) {
      double loaded[kLoads];
#pragma unroll
      for (unsigned u = 0; u < kLoads; ++u) {
        const unsigned i = at + u * kThreads;
        loaded[u] = first <= i && i < last ? chunks[i] : 0;
      }
#pragma unroll
      for (unsigned u = 0; u < kLoads; ++u) {
        const unsigned i = at + u * kThreads;
        all += loaded[u];
        own += begin <= i && i < end ? loaded[u] : 0;
      }
    }
  }
};

template <int kOperands>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ List<kOperands> list, const Results results) {
  SIMT_SHARED(double, warp_sums, kThreads / kWarp);
  SIMT_SHARED(bool, is_last, 2);

  const auto [j, begin, end] = find_chunk(list);
  const double sum = block_sum<kThreads>(sum_chunk(list.operands[j], begin, end), warp_sums);
  if (threadIdx.x == 0) results.chunks[results.first_chunk + blockIdx.x] = sum;
  __syncthreads();
  // Two warps count at the same time, because either count takes long. Which block is last makes no difference to a
  // result. The last block of an operand need not be the last of all.
  const unsigned first_own = list.operands[j].first_block;
  const unsigned last_own = j + 1 < list.count ? list.operands[j + 1].first_block : gridDim.x;
  const auto comes_last = [](unsigned* counter, unsigned blocks) {
    return increment_acquire_release(counter, blocks - 1) == blocks - 1;
  };
  if (threadIdx.x == 0) is_last[0] = comes_last(results.arrived + j, last_own - first_own);
  if (threadIdx.x == kWarp)
    is_last[1] = results.total != nullptr && comes_last(results.arrived + list.count, gridDim.x);
  __syncthreads();
  if (!is_last[0] && !is_last[1]) return;

  const unsigned own = results.first_chunk + first_own, own_end = results.first_chunk + last_own;
  Sums sums;
  sums.add(results.chunks, is_last[1] ? 0 : own, is_last[1] ? results.first_chunk + gridDim.x : own_end, own, own_end);
  if (is_last[0]) {
    const double term = block_sum<kThreads>(sums.own, warp_sums);
    if (threadIdx.x == 0) write(results.terms, results.wide, results.first_term + j, term / 2);
    __syncthreads();
  }
  if (is_last[1]) {
    const double total = block_sum<kThreads>(sums.all, warp_sums);
    if (threadIdx.x == 0) write(results.total, results.wide, 0, total / 2);
  }
}

template <int kOperands>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ List<kOperands> list, const void* __restrict__ grad, bool wide_grad) {
  const double factor = read(grad, wide_grad, 0);
  const auto [j, begin, end] = find_chunk(list);
  write_chunk(list.operands[j], begin, end, factor);
}

// ---- Launch

inline void launch_forward(const Launch& launch, const Results& results, cudaStream_t stream) {
  with_list(launch, [&](const auto& list) {
    constexpr int kOperands = std::extent_v<decltype(list.operands)>;
    SIMT_LAUNCH((forward_kernel<kOperands>), dim3(launch.blocks), dim3(kThreads), 0, stream, list, results);
  });
}

inline void launch_backward(const Launch& launch, const void* grad, bool wide_grad, cudaStream_t stream) {
  with_list(launch, [&](const auto& list) {
    constexpr int kOperands = std::extent_v<decltype(list.operands)>;
    SIMT_LAUNCH((backward_kernel<kOperands>), dim3(launch.blocks), dim3(kThreads), 0, stream, list, grad, wide_grad);
  });
}

}  // namespace talib_fast::squared_distance
