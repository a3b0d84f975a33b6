// The device that a call's tensors are on, made the current one, and torch's current stream there; with the harness of
// tests/simt, for which g++ compiles this, the one stream there is.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "runtime.cuh"

#if defined(__CUDACC__)
// weak: a library with CUDA kernels has to load under a CPU build of torch, which does not have this function
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace talib_fast {

inline cudaStream_t current_stream([[maybe_unused]] const torch::stable::Tensor& tensor) {
#if defined(__CUDACC__)
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
#else
  return simt::current_stream();
#endif
}

// Makes a device, or a tensor's, the current one, and afterwards the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor) {
    if (tensor.is_cuda()) enter(tensor.get_device_index());
  }
  explicit DeviceGuard(int index) { enter(index); }
  ~DeviceGuard() {
    if (previous_ != kNone) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void enter(int index) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (index == previous_) previous_ = kNone;
    else check(cudaSetDevice(index), "cudaSetDevice");
  }

  static constexpr int kNone = -1;
  int previous_ = kNone;
};

}  // namespace talib_fast
