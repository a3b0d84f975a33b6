// Kernels with one bug each, and their correct twins. The line that a tool must report ends with `// BUG` and the name
// of the kernel.
#pragma once
#include "cuda/runtime.cuh"

namespace talib_fast {

template <bool kPlanted>
__global__ void missing_barrier(float* out) {
  SIMT_SHARED(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!kPlanted) {
    __syncthreads();
  }
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];  // BUG missing_barrier
}

// Only one of several barriers is missing; the order that the others make must not hide it.
template <bool kPlanted>
__global__ void missing_later_barrier(float* out) {
  SIMT_SHARED(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float neighbour = values[(threadIdx.x + 1) % 64];
  if (!kPlanted) {
    __syncthreads();
  }
  values[threadIdx.x] = 2 * neighbour;  // BUG missing_later_barrier
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

template <bool kPlanted>
__global__ void missing_warp_barrier(float* out) {
  SIMT_SHARED(float, values, 32);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!kPlanted) {
    __syncwarp();
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];  // BUG missing_warp_barrier
}

// Two blocks that write one element.
template <bool kPlanted>
__global__ void overlapping_blocks(float* out) {
  const unsigned first = blockIdx.x * (kPlanted ? blockDim.x - 1 : blockDim.x);
  out[first + threadIdx.x] = 1.0f;  // BUG overlapping_blocks
}

template <bool kPlanted>
__global__ void shared_overflow(float* out) {
  SIMT_SHARED(float, values, 32);
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + (kPlanted ? 1 : 0)];  // BUG shared_overflow
}

template <bool kPlanted>
__global__ void dynamic_shared_overflow(float* out) {
  SIMT_DYN_SHARED(float, values);
  values[threadIdx.x + (kPlanted ? 1 : 0)] = 1.0f;  // BUG dynamic_shared_overflow
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

template <bool kPlanted>
__global__ void global_overflow(float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x + (kPlanted ? 1 : 0)] = 1.0f;  // BUG global_overflow
}

template <bool kPlanted>
__global__ void misaligned_vector(const float* in, float* out) {
  const float* source = in + 4 * threadIdx.x + (kPlanted ? 1 : 0);
  store_vector(out + 4 * threadIdx.x, load_vector<4>(source));  // BUG misaligned_vector
}

template <bool kPlanted>
__global__ void divergent_barrier(float* out) {
  SIMT_SHARED(float, value, 1);
  if (threadIdx.x == 0) {
    value[0] = 3.0f;
    if (kPlanted) {
      __syncthreads();
    }
  }
  __syncthreads();  // BUG divergent_barrier
  out[threadIdx.x] = value[0];
}

template <bool kPlanted>
__global__ void deadlock(float* out) {
  if (!kPlanted || threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);  // BUG deadlock
  }
  __syncthreads();
}

// Two shuffles, each of half a warp, with the mask of a whole warp.
template <bool kPlanted>
__global__ void divergent_shuffle(float* out) {
  float value = 1.0f;
  if (kPlanted && threadIdx.x < 16) {
    value += __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    value += __shfl_xor_sync(0xffffffffu, value, 1);  // BUG divergent_shuffle
  }
  out[threadIdx.x] = value;
}

// A block of 48 threads has half a warp.
template <bool kPlanted>
__global__ void absent_lanes(float* out) {
  float sum = 1.0f;
  for (int offset = kPlanted || threadIdx.x < 32 ? 16 : 8; offset; offset /= 2) {
    sum += __shfl_down_sync(__activemask(), sum, offset, kPlanted || threadIdx.x < 32 ? 32 : 16);  // BUG absent_lanes
  }
  out[threadIdx.x] = sum;
}

template <bool kPlanted>
__global__ void wrong_mask(float* out) {
  out[threadIdx.x] = __shfl_sync(kPlanted ? 0xffffu : 0xffffffffu, 1.0f, 0);  // BUG wrong_mask
}

// Block 0 passes a value to block 1.
template <bool kPlanted>
__global__ void missing_release(float* value, unsigned* ready, float* out) {
  if (blockIdx.x == 0) {
    value[0] = 2.0f;  // BUG missing_release
    if (kPlanted) {
      atomicAdd(ready, 1u);
    } else {
      increment_release(ready, 1);
    }
  } else {
    wait_acquire(ready, 1);
    out[0] = value[0];
  }
}

template <bool kPlanted>
__global__ void missing_acquire(float* value, unsigned* ready, float* out) {
  if (blockIdx.x == 0) {
    value[0] = 2.0f;
    increment_release(ready, 1);
  } else {
    if (kPlanted) {
      while (atomicAdd(ready, 0u) == 0) {
      }
    } else {
      wait_acquire(ready, 1);
    }
    out[0] = value[0];  // BUG missing_acquire
  }
}

// A block waits for a later block, which may never start while this one runs.
template <bool kPlanted>
__global__ void endless_wait(unsigned* ready) {
  if (blockIdx.x == (kPlanted ? 0 : 1)) {
    wait_acquire(ready, 1);  // BUG endless_wait
  } else {
    increment_release(ready, 1);
  }
}

template <bool kPlanted>
__global__ void uninitialised_shared(float* out) {
  SIMT_SHARED(float, values, 33);
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + (kPlanted ? 1 : 0)];
}

template <bool kPlanted>
__global__ void static_and_dynamic_shared(float* out) {
  SIMT_DYN_SHARED(float, dynamic);
  SIMT_SHARED(float, fixed, kPlanted ? 33 : 32);  // BUG static_and_dynamic_shared
  dynamic[threadIdx.x] = 1.0f;
  fixed[threadIdx.x] = 2.0f;
  out[threadIdx.x] = dynamic[threadIdx.x] + fixed[threadIdx.x];
}

}  // namespace talib_fast
