// Says what this library was built from and by; `python -m talib_fast info` prints it.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// `key=value` lines; the build gives all but the compiler's
std::string build_info() { return std::string("compiler=") + kCompiler + "\n" TALIB_FAST_BUILD; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(talib_fast, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
