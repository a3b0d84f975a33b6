// The soft threshold on the GPU, and its gradient. No header of torch is included here: nvcc compiles this for the GPU
// and g++, with the harness of tests/simt, for the host, where sanitizers watch the same threads and the same memory.
#pragma once

#include "../types.h"
#include "runtime.cuh"

#include <algorithm>
#include <cstdint>

namespace talib_fast::soft_threshold {

constexpr int kThreads = 256;

// What a launch works on; it travels in the launch's parameters. T: dtype of all three tensors.
template <typename T>
struct Operands {
  const T* __restrict__ x;   // [elements]
  const T* __restrict__ dy;  // [elements]; null in the forward pass
  T* __restrict__ out;       // [elements]
  int64_t elements;          // 64 bits: a tensor may have more than 2^31
  acc_t<T> threshold;        // float, but double for double: halves are calculated with in float
};

// What is left of x beyond [-threshold, threshold]; of infinities and NaN, themselves.
template <typename A>
__device__ __forceinline__ A shrunk(A x, A threshold) {
  const A raised = x < -threshold ? -threshold : x;
  return x - (raised > threshold ? threshold : raised);
}

// V consecutive elements from `at` on, as one word of up to 16 bytes; with V = 1 the scalar path.
template <int V, bool kBackward, typename T>
__device__ __forceinline__ void write(const Operands<T>& operands, int64_t at) {
  const Vector<T, V> x = load_vector<V>(operands.x + at);
  Vector<T, V> values;
  if constexpr (kBackward) values = load_vector<V>(operands.dy + at);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const acc_t<T> value = to_acc(x.lane[k]), threshold = operands.threshold;
    if constexpr (!kBackward) values.lane[k] = from_acc<T>(shrunk(value, threshold));
    else if (value >= -threshold && value <= threshold) values.lane[k] = from_acc<T>(0);
  }
  store_vector(operands.out + at, values);
}

// Threads stride over the grid, so that neighbouring threads have neighbouring addresses in every step. kVectors: all
// addresses suit vectors of 16 bytes; what they leave over at the end goes element by element.
template <typename T, bool kBackward, bool kVectors>
__global__ void __launch_bounds__(kThreads) shrink_kernel(const Operands<T> operands) {
  constexpr int V = kVectors ? 16 / sizeof(T) : 1;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads, vectors = operands.elements / V;
  for (int64_t i = thread; i < vectors; i += threads) write<V, kBackward>(operands, i * V);
  if constexpr (kVectors) {
    const int64_t rest = vectors * V + thread;  // fewer than V elements: one for each of the first threads
    if (rest < operands.elements) write<1, kBackward>(operands, rest);
  }
}

// ---- Launch

// The one place that decides how a launch looks: a thread for each vector, until all multiprocessors are busy.
inline unsigned choose_blocks(int64_t vectors, int multiprocessors) {
  constexpr int64_t kBlocksPerMultiprocessor = 32;
  return static_cast<unsigned>(
      std::clamp<int64_t>(ceil_div(vectors, kThreads), 1, kBlocksPerMultiprocessor * multiprocessors));
}

template <bool kBackward, typename T>
void launch(const Operands<T>& operands, int multiprocessors, cudaStream_t stream) {
  if (operands.elements == 0) return;  // a launch of no block is an error
  constexpr uintptr_t kVectorBytes = 16;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(operands.x) | reinterpret_cast<uintptr_t>(operands.dy) |
                              reinterpret_cast<uintptr_t>(operands.out);
  if (addresses % kVectorBytes == 0) {
    const unsigned blocks = choose_blocks(operands.elements * sizeof(T) / kVectorBytes, multiprocessors);
    SIMT_LAUNCH((shrink_kernel<T, kBackward, true>), dim3(blocks), dim3(kThreads), 0, stream, operands);
  } else {
    const unsigned blocks = choose_blocks(operands.elements, multiprocessors);
    SIMT_LAUNCH((shrink_kernel<T, kBackward, false>), dim3(blocks), dim3(kThreads), 0, stream, operands);
  }
}

}  // namespace talib_fast::soft_threshold
