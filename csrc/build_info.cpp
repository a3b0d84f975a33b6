// Says what this library was built by and for; `python -m talib_fast info` prints it.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

#define TALIB_FAST_STRING_(x) #x
#define TALIB_FAST_STRING(x) TALIB_FAST_STRING_(x)

std::string build_info() {
  return "built by compiler " __VERSION__ " for torch >= 2.10, with the headers of " TALIB_FAST_STRING(TALIB_FAST_TORCH_VERSION);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(talib_fast, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
