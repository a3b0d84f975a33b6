// How a .cu file registers its kernels: for CUDA or, compiled by g++ with the harness of tests/simt, for the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "driver.h"

#if defined(__CUDACC__)
#define TALIB_FAST_KERNEL_DEVICE CUDA
#else
#define TALIB_FAST_KERNEL_DEVICE CPU
#endif

namespace talib_fast {

// The error of a launch on a GPU for which this library holds no code; cudaSuccess if it holds some.
cudaError_t launch_error(int device);

template <typename... Results>
constexpr size_t count_results(const std::tuple<Results...>*) {
  return sizeof...(Results);
}
constexpr size_t count_results(const void*) { return 1; }

// Calls an operator of talib_fast through the dispatcher.
template <typename Result, typename... Arguments>
Result call_operator(const std::string& name, const Arguments&... arguments) {
  namespace stable = torch::stable::detail;
  constexpr Result* kNoResult = nullptr;
  constexpr size_t kResults = count_results(kNoResult);
  std::array<StableIValue, std::max(kResults, sizeof...(Arguments))> stack{stable::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (requires { std::tuple_size<Result>::value; }) {
    return [&]<size_t... i>(std::index_sequence<i...>) {
      return Result{stable::to<std::tuple_element_t<i, Result>>(stack[i])...};
    }(std::make_index_sequence<kResults>());
  } else {
    return stable::to<Result>(stack[0]);
  }
}

inline int device_of(const torch::stable::Tensor& tensor) { return std::max<int>(0, tensor.get_device_index()); }
inline int device_of(const std::vector<torch::stable::Tensor>& tensors) {
  return tensors.empty() ? 0 : device_of(tensors[0]);
}

template <size_t kLength>
struct Name {
  char text[kLength];
  constexpr Name(const char (&literal)[kLength]) { std::copy_n(literal, kLength, text); }
};

// A kernel that calls PyTorch's implementation on a GPU for which the library holds no code. Python registers that
// implementation as ..._in_pytorch. The first argument, a tensor or a list of tensors, tells the GPU.
template <typename Kernel>
struct Guarded;
template <typename Result, typename First, typename... Rest>
struct Guarded<Result (*)(First, Rest...)> {
  template <Name kName, Result (*kKernel)(First, Rest...)>
  static Result call(First first, Rest... rest) {
    if (launch_error(device_of(first)) == cudaSuccess) return kKernel(first, rest...);
    return call_operator<Result>(std::string("talib_fast::") + kName.text + "_in_pytorch", first, rest...);
  }
};

template <Name kName, auto kKernel>
void register_kernel(torch::stable::detail::StableLibrary& library) {
  using Kernel = Guarded<decltype(kKernel)>;
  if (unserved_by_driver().empty()) library.impl(kName.text, TORCH_BOX((&Kernel::template call<kName, kKernel>)));
}

}  // namespace talib_fast
