// The device that a .cu file registers its kernels for, if its driver serves them, and the stream that they go to: CUDA
// and torch's current stream, or, compiled by g++ with the harness of tests/simt, the CPU and the one stream there is.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "../driver.h"
#include "runtime.cuh"

#if defined(__CUDACC__)
#define TALIB_FAST_KERNEL_DEVICE CUDA
// weak: a library with CUDA kernels has to load under a CPU build of torch, which does not have this function
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#else
#define TALIB_FAST_KERNEL_DEVICE CPU
#endif

namespace talib_fast {

// Otherwise no kernel is registered, and PyTorch's implementations serve. Within a major version every driver does.
inline bool driver_serves_kernels() {
#if defined(__CUDACC__)
  return driver_version() == 0 || driver_version() / 1000 >= CUDART_VERSION / 1000;
#else
  return true;
#endif
}

inline cudaStream_t current_stream([[maybe_unused]] const torch::stable::Tensor& tensor) {
#if defined(__CUDACC__)
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#else
  return simt::current_stream();
#endif
}

// Makes a tensor's device the current one, and afterwards the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor) {
    if (!tensor.is_cuda()) return;
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    const int index = tensor.get_device_index();
    if (index == previous_) previous_ = kNone;
    else check(cudaSetDevice(index), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != kNone) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static constexpr int kNone = -1;
  int previous_ = kNone;
};

}  // namespace talib_fast
