// Says where the CUDA kernels can run. The driver is asked when the kernels are registered. A GPU is asked when a
// kernel is first called there, not before: to ask a GPU initialises CUDA, and a process forked after that could not
// use CUDA.
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "cuda/registration.h"
#include "cuda/stream.h"

namespace talib_fast {
namespace {

constexpr int kMostDevices = 128;  // torch counts them in 8 bits

__global__ void probe_kernel() {}  // compiled for what all kernels are compiled for

cudaError_t probe(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  (void)cudaGetLastError();
  switch (error) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled: return error;
    default: return cudaSuccess;  // a launch will report any other error
  }
}

// Why the kernels are not registered or, given a GPU, do not run there: the second half of a sentence, or empty if they
// do.
std::string unserved(std::optional<int64_t> device) {
  if (!device) return unserved_by_driver();
  STD_TORCH_CHECK(*device >= 0 && *device < kMostDevices, "expected a GPU's number, got ", *device);
  const int index = static_cast<int>(*device);
  const cudaError_t error = launch_error(index);
  if (error == cudaSuccess) return "";
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "cudaDeviceGetAttribute");
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  return "this GPU is of compute capability " + capability + " (" + cudaGetErrorName(error) +
         "): install talib_fast again with TORCH_CUDA_ARCH_LIST=" + capability;
}

}  // namespace

cudaError_t launch_error(int device) {
  constexpr int kUnknown = 0, kKnown = 1;  // an error is added to kKnown
  static std::array<std::atomic<int>, kMostDevices> answers;
  int answer = answers[device].load(std::memory_order_relaxed);
  if (answer == kUnknown) answers[device].store(answer = kKnown + probe(device), std::memory_order_relaxed);
  return static_cast<cudaError_t>(answer - kKnown);
}

}  // namespace talib_fast

STABLE_TORCH_LIBRARY_FRAGMENT(talib_fast, m) { m.def("unserved(int? device=None) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CompositeExplicitAutograd, m) {
  m.impl("unserved", TORCH_BOX(&talib_fast::unserved));
}
