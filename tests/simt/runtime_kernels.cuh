// Kernels that use all of runtime.cuh, for g++ and nvcc.
#pragma once
#include "cuda/runtime.cuh"

namespace talib_fast {

// Block sums by shuffles and shared memory; the block that finishes last adds them up.
template <typename T, int V>
__global__ void __launch_bounds__(256)
    scale_and_sum(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ copy, acc_t<T> factor, int n,
                  acc_t<T>* partial, unsigned* arrived, acc_t<T>* total) {
  using A = acc_t<T>;
  SIMT_SHARED(A, warp_sums, 32);
  SIMT_SHARED(bool, is_last, 1);
  A sum = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * V; i < n;
       i += static_cast<int>(gridDim.x * blockDim.x) * V) {
    const Vector<T, V> in = load_vector<V>(x + i);
    Vector<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A value = to_acc(in.lane[k]) * factor;
      out.lane[k] = from_acc<T>(value);
      sum += value;
    }
    store_vector(y + i, out);
    store_vector(copy + i, unpack<T, V>(load_packed_last<V>(x + i)));
  }
#pragma unroll
  for (int offset = warpSize / 2; offset; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % warpSize == 0) {
    warp_sums[threadIdx.x / warpSize] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned w = 0; w < blockDim.x / warpSize; ++w) {
      sum += warp_sums[w];
    }
    partial[blockIdx.x] = sum;
    is_last[0] = increment_acquire_release(arrived, gridDim.x) == gridDim.x - 1;
    if (is_last[0]) {
      sum = 0;
      for (unsigned b = 0; b < gridDim.x; ++b) {
        sum += partial[b];
      }
      total[0] = sum;
    }
  }
}

// Block 0 waits for the others. All blocks must run at once, or block 0 must run last.
template <typename T>
__global__ void collect_from_others(T* __restrict__ slots, unsigned* arrived, T* __restrict__ sum) {
  SIMT_DYN_SHARED(T, staged);
  const bool collects = blockIdx.x == gridDim.x - 1;
  if (!collects) {
    staged[threadIdx.x] = from_acc<T>(static_cast<acc_t<T>>(blockIdx.x + threadIdx.x));
    __syncthreads();
    if (threadIdx.x == 0) {
      acc_t<T> total = 0;
      for (unsigned i = 0; i < blockDim.x; ++i) {
        total += to_acc(staged[i]);
      }
      slots[blockIdx.x] = from_acc<T>(total);
      increment_release(arrived, gridDim.x);
    }
    return;
  }
  if (threadIdx.x == 0) {
    wait_acquire(arrived, gridDim.x - 1);
    acc_t<T> total = 0;
    for (unsigned b = 0; b + 1 < gridDim.x; ++b) {
      total += to_acc(slots[b]);
    }
    sum[0] = from_acc<T>(total);
  }
}

constexpr int kDeviceFunctions = 14;  // numbers a thread

static __global__ void device_functions(float* out) {
  const unsigned lane = threadIdx.x % warpSize;
  const float value = static_cast<float>(lane);
  float* mine = out + threadIdx.x * kDeviceFunctions;
  mine[0] = __shfl_sync(0xffffffffu, value, 3);
  mine[1] = __shfl_down_sync(0xffffffffu, value, 1, 8);
  mine[2] = __shfl_up_sync(0xffffffffu, value, 2);
  mine[3] = static_cast<float>(__popc(__ballot_sync(0xffffffffu, lane < 5)));
  mine[4] = static_cast<float>(__any_sync(0xffffffffu, lane == 7) + 2 * __all_sync(0xffffffffu, lane < 31));
  __syncwarp();
  mine[5] = rsqrtf(4.0f) + static_cast<float>(rsqrt(16.0));
  mine[6] = fmaxf(sqrtf(9.0f), fminf(fabsf(-2.0f), 5.0f)) + fmaf(2.0f, 3.0f, 4.0f);
  mine[7] = static_cast<float>(min(3, 4) + max(5, 6));
  mine[8] = __ldg(mine + 7);
  mine[9] = static_cast<float>(__clz(1) + __ffs(8));
  mine[10] = __expf(0.0f) + __fdividef(6.0f, 3.0f);
  mine[11] = 0.0f;
  atomicAdd(mine + 11, 2.0f);
  mine[12] = exp(0.0f) + erf(-9.0f) + fma(0x1.000002p0f, 0x1.000002p0f, -0x1.000004p0f);  // rounded once
  SIMT_SHARED(unsigned, bits, 2);
  if (lane == 0) bits[threadIdx.x / warpSize] = 0;
  __syncwarp();
  atomicOr(bits + threadIdx.x / warpSize, 1u << lane);
  __syncwarp();
  mine[13] = static_cast<float>(bits[threadIdx.x / warpSize] == 0xffffffffu);
}

template <typename T, int V>
void launch_scale_and_sum(const T* x, T* y, T* copy, acc_t<T> factor, int n, acc_t<T>* partial, unsigned* arrived,
                          acc_t<T>* total, cudaStream_t stream) {
  int device = 0, multiprocessors = 0, resident = 0, shared_bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, scale_and_sum<T, V>, 128, 0), "occupancy");
  check(cudaMemsetAsync(arrived, 0, sizeof(*arrived), stream), "cudaMemsetAsync");
  SIMT_LAUNCH((scale_and_sum<T, V>), dim3(multiprocessors * resident), dim3(128), 0, stream, x, y, copy, factor, n,
              partial, arrived, total);
}

template <typename T>
void launch_collect_from_others(T* slots, unsigned* arrived, T* sum, int blocks, int threads, cudaStream_t stream) {
  const size_t bytes = sizeof(T) * threads;
  allow_shared_bytes(collect_from_others<T>, static_cast<int64_t>(bytes), current_device());
  SIMT_LAUNCH(collect_from_others<T>, blocks, threads, bytes, stream, slots, arrived, sum);
}

inline void launch_device_functions(float* out, cudaStream_t stream) {
  SIMT_LAUNCH(device_functions, 1, 64, 0, stream, out);
}

}  // namespace talib_fast
