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
  (void)cudaGetLastError();  // else the next launch would report this error again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

struct Device {
  int multiprocessors;
  int threads_per_block;  // 1024 on every GPU; fewer in the host harness, whose threads cost more
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

// Allows launches of a kernel, one without static shared memory, so much dynamic shared memory. The limit belongs to
// the kernel, not to a launch. It is set to all that a block can have: a lower limit would also hold for other threads,
// and for graphs that are captured but not yet run.
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
  with_type<__half, __nv_bfloat16>(type, f);
}

// V consecutive elements that move as one word of at most 16 bytes.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  static_assert(sizeof(T) * V <= 16 && (V & (V - 1)) == 0);
  T lane[V];
};

// A vector moves as one word. Stores of 8 and 16 bytes are inline PTX: nvcc takes ordinary ones apart in unrolled
// loops, and joins only half of them again.
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

template <typename T, int V>
using Packed = typename Word<sizeof(T) * V>::type;

template <typename Word>
__device__ __forceinline__ void store_word(void* destination, const Word& word) {
  *static_cast<Word*>(destination) = word;
}
template <>
__device__ __forceinline__ void store_word(void* destination, const uint2& word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(destination), "r"(word.x), "r"(word.y) : "memory");
}
template <>
__device__ __forceinline__ void store_word(void* destination, const uint4& word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(destination), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
#else
template <typename T, int V>
using Packed = Vector<T, V>;
#endif

// `source` and `destination` of what follows are aligned to sizeof(T) * V.

// Loads a vector as one packed word. To unpack a word is to wait for its load, so what is loaded ahead stays packed.
template <int V, typename T>
__device__ __forceinline__ Packed<T, V> load_packed(const T* source) {
  return *reinterpret_cast<const Packed<T, V>*>(source);
}

// The same for data that nothing reads again soon and no kernel in flight writes. It leaves the caches to other data.
template <int V, typename T>
__device__ __forceinline__ Packed<T, V> load_packed_last(const T* source) {
#if defined(__CUDACC__)
  return __ldcs(reinterpret_cast<const Packed<T, V>*>(source));
#else
  return load_packed<V>(source);
#endif
}

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> unpack(const Packed<T, V>& packed) {
  Vector<T, V> value;
  memcpy(&value, &packed, sizeof(value));
  return value;
}

template <typename T, int V>
__device__ __forceinline__ Packed<T, V> pack(const Vector<T, V>& value) {
  Packed<T, V> packed;
  memcpy(&packed, &value, sizeof(packed));
  return packed;
}

template <int V, typename T>
__device__ __forceinline__ Vector<T, V> load_vector(const T* source) {
  return unpack<T, V>(load_packed<V>(source));
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* destination, const Vector<T, V>& value) {
#if defined(__CUDACC__)
  store_word(destination, pack(value));
#else
  *reinterpret_cast<Vector<T, V>*>(destination) = value;
#endif
}

// Counters in global memory, by which blocks hand data to each other. Like atomicInc's they begin again at 0 after
// `last`, so that a kernel leaves them as it found them. A thread that acquires a released value sees all that the
// releasing thread wrote before, or saw through __syncthreads.

// Waits until the counter is at least `least`. There is one fence, at the end, because every acquire empties the
// first-level cache.
#if defined(__CUDACC__)
__device__ __forceinline__ void wait_acquire(const unsigned* counter, unsigned least) {
  for (;;) {
    unsigned value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    if (value >= least) break;
    __nanosleep(64);
  }
  asm volatile("fence.acq_rel.gpu;" : : : "memory");
}
#else
using simt::wait_acquire;
#endif

__device__ __forceinline__ void increment_release(unsigned* counter, unsigned last) {
#if defined(__CUDACC__)
  asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" : : "l"(counter), "r"(last) : "memory");
#else
  simt::increment(counter, last, __ATOMIC_RELEASE);
#endif
}

// The counter's value before.
__device__ __forceinline__ unsigned increment_acquire_release(unsigned* counter, unsigned last) {
#if defined(__CUDACC__)
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
  return old;
#else
  return simt::increment(counter, last, __ATOMIC_ACQ_REL);
#endif
}

constexpr int kWarp = 32;

// Divides in 32 bits where both numbers fit, as nearly all do: it takes less time.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
  return a / b;
}

// The sum over each kLanes neighbouring lanes of a warp, for all of them. Every lane of the warp takes part.
template <int kLanes = kWarp>
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sum over a block of kThreads, for its first thread alone. Another call needs a barrier first.
template <int kThreads>
__device__ __forceinline__ double block_sum(double value, double* warp_sums) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert((kWarps & (kWarps - 1)) == 0);
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  return threadIdx.x < kWarp ? warp_sum<kWarps>(warp_sums[threadIdx.x % kWarps]) : 0;
}

// The operand that this block works on, among `low` to `high - 1` of a launch's list. Blocks are in the order of their
// operands.
template <typename List>
__device__ __forceinline__ int operand_index(const List& list, int low, int high) {
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.operands[middle].first_block <= blockIdx.x) low = middle;
    else high = middle;
  }
  return low;
}

template <typename List>
__device__ __forceinline__ const auto& find_operand(const List& list) {
  return list.operands[operand_index(list, 0, list.count)];
}

}  // namespace talib_fast
