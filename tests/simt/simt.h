// Runs CUDA kernels on the host. g++ compiles them with this header instead of the CUDA headers. Every CUDA thread is a
// fiber, and every running block has an operating-system thread. AddressSanitizer, UndefinedBehaviorSanitizer and
// ThreadSanitizer see CUDA threads and memory as threads and memory of the host. The harness itself finds deadlocks,
// divergent barriers and wrong warp operations.
//
// A launch reads these environment variables:
//   SIMT_BLOCKS=k           number of blocks that run at once, 1 by default
//   SIMT_SEED=n             another order of the threads in a block, and other times at which blocks start
//   SIMT_MULTIPROCESSORS=n  multiprocessors of the device, 3 by default
//   SIMT_SHARED_BYTES=n     the most shared memory of a block, 49152 by default
//   SIMT_THREADS=n          the most threads of a block, 1024 by default
//   SIMT_CACHE_BYTES=n      size of the second-level cache, 1048576 by default
//   SIMT_DRIVER=n           version of the driver, 13000 by default
//   SIMT_UNSERVED=1         the library has no code for the device
//   SIMT_LOG=file           each launch appends a line: blocks, threads, bytes of dynamic shared memory, kernel
//
// The harness shows nothing about speed, bank conflicts, nvcc's optimiser, or weak memory order (the host's is strong;
// ThreadSanitizer knows only the order that a barrier or an acquire makes).
#pragma once

#include <math.h>  // not <cmath>: exp(float) and the like without std::, as in CUDA

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_types.h"
#include "launch.h"

#define SIMT_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...)                   \
  simt::launch(simt::At::current(), #kernel, kernel, (grid), (block), (dynamic_shared_bytes), \
               (stream)__VA_OPT__(, ) __VA_ARGS__)

#define SIMT_SHARED(T, name, N) \
  static char simt_tag_##name;  \
  T* const name =               \
      static_cast<T*>(simt::shared_array(&simt_tag_##name, sizeof(T) * (N), alignof(T), simt::At::current()))

#define SIMT_DYN_SHARED(T, name) T* const name = static_cast<T*>(simt::dynamic_shared_array(simt::At::current()))

// ---------------------------------------------------------------------------------------------------- device functions

#define threadIdx (simt::self().index)
#define blockIdx (simt::engine().block_index)
#define blockDim (simt::engine().launch->block)
#define gridDim (simt::engine().launch->grid)

inline void __syncthreads(simt::At at = simt::At::current()) { simt::barrier(at); }
inline int __syncthreads_or(int predicate, simt::At at = simt::At::current()) {
  return simt::barrier_or(predicate != 0, at);
}

inline void __syncwarp(unsigned mask = 0xffffffff, simt::At at = simt::At::current()) {
  simt::leave(simt::collect(mask, simt::Operation::kSync, nullptr, 0, at));
}

SIMT_UNTRACKED inline unsigned __activemask() { return simt::engine().warps[simt::self().warp].live; }

inline unsigned __ballot_sync(unsigned mask, bool predicate, simt::At at = simt::At::current()) {
  return simt::ballot(mask, predicate, at);
}

inline int __any_sync(unsigned mask, bool predicate, simt::At at = simt::At::current()) {
  return simt::ballot(mask, predicate, at) != 0;
}

inline int __all_sync(unsigned mask, bool predicate, simt::At at = simt::At::current()) {
  return simt::ballot(mask, !predicate, at) == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, simt::At at = simt::At::current()) {
  const unsigned segment = simt::lane() & ~static_cast<unsigned>(width - 1);
  return simt::shuffle(mask, value, segment + (static_cast<unsigned>(source) & (width - 1)), false, at);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, simt::At at = simt::At::current()) {
  const unsigned last = simt::lane() | static_cast<unsigned>(width - 1), source = simt::lane() + delta;
  return simt::shuffle(mask, value, source, source > last, at);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, simt::At at = simt::At::current()) {
  const unsigned segment = simt::lane() & ~static_cast<unsigned>(width - 1);
  return simt::shuffle(mask, value, simt::lane() - delta, simt::lane() < segment + delta, at);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = warpSize, simt::At at = simt::At::current()) {
  const unsigned last = simt::lane() | static_cast<unsigned>(width - 1);
  const unsigned source = simt::lane() ^ static_cast<unsigned>(flip);
  return simt::shuffle(mask, value, source, source > last, at);
}

namespace simt {
template <typename T, typename Update>
T update_atomically(T* address, Update update, int order = __ATOMIC_RELAXED) {
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  for (;;) {
    T wanted = update(old);
    if (__atomic_compare_exchange(address, &old, &wanted, true, order, __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

// Waits until the counter is at least `least`.
inline void wait_acquire(const unsigned* counter, unsigned least, At at = At::current()) {
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < least) {
    pause(at);
  }
}

// Counts up to `last`, then starts again at 0.
inline unsigned increment(unsigned* address, unsigned last, int order) {
  return update_atomically(address, [=](unsigned old) { return old >= last ? 0 : old + 1; }, order);
}
}  // namespace simt

inline unsigned atomicInc(unsigned* address, unsigned last) { return simt::increment(address, last, __ATOMIC_RELAXED); }

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::update_atomically(address, [=](T old) { return static_cast<T>(old + value); });
}

template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt::update_atomically(address, [=](T old) { return old | value; });
}

// For ThreadSanitizer all fences are ordered, even those of unrelated threads. Prefer runtime.cuh's acquire and
// release.
SIMT_UNTRACKED inline void __threadfence() {
  static simt::Clock clock;
  simt::acquire(clock);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  simt::release(clock);
}

SIMT_UNTRACKED inline void __threadfence_block() { __threadfence(); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float rsqrt(float value) { return rsqrtf(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __fdividef(float a, float b) { return a / b; }

template <typename T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}

template <typename T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}

inline float __half2float(__half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 0x1f, mantissa = value.bits & 0x3ff;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 127 - 15;
  return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

// Rounds to nearest, ties to even; NaN becomes 0x7fff, as on the device.
inline __half __float2half_rn(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t result;
  if (bits > 0x7f800000) {
    return {0x7fff};
  } else if (bits >= 0x477ff000) {  // 65520, halfway beyond the largest
    result = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: denormal; the addition rounds
    result = std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    result = (bits + 0xfff + (bits >> 13 & 1) - ((127u - 15) << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

inline float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return {0x7fff};
  }
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ------------------------------------------------------------------------------------------------------------ runtime

namespace simt {
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t fail(cudaError_t error) { return last_error = error; }
}  // namespace simt

inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    default: break;
  }
  return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: break;
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : simt::fail(cudaErrorInvalidDevice); }

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = simt::driver_version = static_cast<int>(simt::setting("SIMT_DRIVER", 13000));
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream,
                                   simt::At at = simt::At::current()) {
  simt::check_stream(stream, "cudaMemsetAsync", at);
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 0;  // the only device
  return cudaSuccess;
}

template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) {
    return simt::fail(cudaErrorInvalidDevice);
  }
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(simt::setting("SIMT_MULTIPROCESSORS", 3));
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(simt::shared_limit()); return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(min(simt::shared_limit(), simt::kDefaultSharedBytes));
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(2 * simt::shared_limit());
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = static_cast<int>(simt::setting("SIMT_THREADS", simt::kMaxThreads));
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2 * simt::kMaxThreads; return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = static_cast<int>(simt::setting("SIMT_CACHE_BYTES", 1 << 20));
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = warpSize; return cudaSuccess;
  }
  return simt::fail(cudaErrorInvalidValue);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value,
                                 simt::At at = simt::At::current()) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > simt::shared_limit()) {
    return simt::fail(cudaErrorInvalidValue);
  }
  simt::SharedMemoryGrants::instance().set(reinterpret_cast<const void*>(kernel), static_cast<size_t>(value), at);
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return simt::setting("SIMT_UNSERVED", 0) ? simt::fail(cudaErrorNoKernelImageForDevice) : cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int /*threads*/, size_t /*dynamic*/) {
  *blocks = 2;
  return cudaSuccess;
}
