// Says what this library was built from and by, and which driver it found; `python -m talib_fast info` prints it.
#include <torch/csrc/stable/library.h>

#include <string>

#include "driver.h"

namespace {

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// `key=value` lines; the build gives all but the compiler's and the driver's
std::string build_info() {
  std::string lines = std::string("compiler=") + kCompiler + "\n" TALIB_FAST_BUILD;
  if (const int driver = talib_fast::driver_version())
    lines += "driver=" + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) + "\n";
  return lines;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(talib_fast, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
