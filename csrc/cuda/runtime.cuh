// The one header that kernels include: nvcc compiles them for the GPU, g++ for the host with the harness of tests/simt.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <simt.h>
#endif

#include "../types.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__CUDACC__)

// SIMT_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...); a template needs parentheses: (k<T, 4>)
#define SIMT_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...)     \
  do {                                                                          \
    kernel<<<(grid), (block), (dynamic_shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::talib_fast::check(::cudaGetLastError(), "launch of " #kernel);            \
  } while (false)

// T name[N] in the block's shared memory
#define SIMT_SHARED(T, name, N) __shared__ T name[N]

// T* name: the launch's dynamic shared memory, aligned to 16 bytes. One name and type for every kernel and template
// instantiation, because nvcc rejects two `extern __shared__` arrays of one name and different types.
#define SIMT_DYN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char simt_dyn_shared[]; \
  T* name = reinterpret_cast<T*>(simt_dyn_shared)

#endif

namespace talib_fast {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch, whosoever it is, would be told of it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

struct Device {
  int multiprocessors;
  int threads_per_block;  // 1024 on every GPU there is; the harness's have fewer, whose threads cost more
  int shared_bytes;       // that a block can have at most
  int cache_bytes;        // of the second level
};

inline Device current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const auto get = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
    return value;
  };
  return {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxThreadsPerBlock),
          get(cudaDevAttrMaxSharedMemoryPerBlockOptin), get(cudaDevAttrL2CacheSize)};
}

constexpr int64_t kAlwaysAllowed = 47 << 10;  // of dynamic shared memory without asking, and a little static

// Lets launches of a kernel without static shared memory have that much of dynamic one. The limit is the kernel's, not
// a launch's: set to less than all, it would be lowered for other threads, and for what is captured but not yet run.
template <typename Kernel>
void allow_shared_bytes(Kernel* kernel, int64_t bytes, const Device& device) {
  if (bytes > kAlwaysAllowed)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes),
          "cudaFuncSetAttribute");
}

// The type to calculate in: float, but double for double.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_acc(float value) { return value; }
__device__ __forceinline__ double to_acc(double value) { return value; }
__device__ __forceinline__ float to_acc(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to the nearest value of T, ties to even.
template <typename T>
__device__ __forceinline__ T from_acc(acc_t<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    static_assert(std::is_same_v<T, acc_t<T>>);
    return value;
  }
}

// f(a zero of that type), for host and device
template <typename F>
constexpr void with_type(FloatType type, const F& f) {
  with_float<__half, __nv_bfloat16>(type, f);
}

// V consecutive elements that move as one word of at most 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  static_assert(sizeof(T) * V <= 16 && (V & (V - 1)) == 0);
  T lane[V];
};

#if defined(__CUDACC__)
template <size_t kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
#endif

// `source` and `destination` of these three are aligned to sizeof(T) * V.
template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load_vector(const T* source) {
#if defined(__CUDACC__)
  const auto word = *reinterpret_cast<const typename Word<sizeof(T) * V>::type*>(source);
  Vector<T, V> value;
  memcpy(&value, &word, sizeof(value));
  return value;
#else
  return *reinterpret_cast<const Vector<T, V>*>(source);
#endif
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* destination, const Vector<T, V>& value) {
#if defined(__CUDACC__)
  typename Word<sizeof(T) * V>::type word;
  memcpy(&word, &value, sizeof(value));
  *reinterpret_cast<decltype(word)*>(destination) = word;
#else
  *reinterpret_cast<Vector<T, V>*>(destination) = value;
#endif
}

// For what is not read again soon: leaves the caches to other data.
template <typename T, int V>
__device__ __forceinline__ void store_vector_streaming(T* destination, const Vector<T, V>& value) {
#if defined(__CUDACC__)
  typename Word<sizeof(T) * V>::type word;
  memcpy(&word, &value, sizeof(value));
  __stcs(reinterpret_cast<decltype(word)*>(destination), word);
#else
  store_vector(destination, value);
#endif
}

// Counters in global memory through which blocks hand data to each other. What a thread wrote, or saw through
// __syncthreads, before a release is visible to a thread that acquires the released value.
__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
#if defined(__CUDACC__)
  unsigned value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
#else
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
#endif
}

__device__ __forceinline__ void add_release(unsigned* counter, unsigned value) {
#if defined(__CUDACC__)
  asm volatile("red.release.gpu.add.u32 [%0], %1;" : : "l"(counter), "r"(value) : "memory");
#else
  __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
#endif
}

// The counter's value before the addition.
__device__ __forceinline__ unsigned add_acquire_release(unsigned* counter, unsigned value) {
#if defined(__CUDACC__)
  unsigned old;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
#else
  return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
#endif
}

constexpr int kWarp = 32;

__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sum over a block of kThreads, for its first thread alone. Another call needs a barrier first.
template <int kThreads>
__device__ __forceinline__ double block_sum(double value, double* warp_sums) {
  constexpr int kWarps = kThreads / kWarp;
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  return sum;
}

// The operand of a launch's list that this block works on. The blocks of all stand in their order.
template <typename List>
__device__ __forceinline__ const auto& find_operand(const List& list) {
  int low = 0, high = list.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.operands[middle].first_block <= blockIdx.x) low = middle;
    else high = middle;
  }
  return list.operands[low];
}

// Between two looks at a counter. Outside this namespace it needs its name in full: POSIX has a pause() too.
#if defined(__CUDACC__)
__device__ __forceinline__ void pause() { __nanosleep(64); }
#else
using simt::pause;
#endif

}  // namespace talib_fast
