// Makes the device of a call's tensors the current one, and finds torch's current stream there. With the harness of
// tests/simt, for which g++ compiles this, there is one device and one stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

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

// Makes a device the current one as long as the guard lives.
#if defined(__CUDACC__)
using torch::stable::accelerator::DeviceGuard;
#else
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#endif

}  // namespace talib_fast
