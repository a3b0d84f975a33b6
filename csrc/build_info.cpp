// Says what this library was built by and for; `python -m talib_fast info` prints it.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

#define TALIB_FAST_STRING_(x) #x
#define TALIB_FAST_STRING(x) TALIB_FAST_STRING_(x)

std::string build_info() {
  std::string info = "compiler=" __VERSION__ " torch=" TALIB_FAST_STRING(TALIB_FAST_TORCH_VERSION);
#ifdef TALIB_FAST_CUDA_ARCHITECTURES
  info += " cuda=" TALIB_FAST_STRING(TALIB_FAST_CUDA_ARCHITECTURES);
#endif
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(talib_fast, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
