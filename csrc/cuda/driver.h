// The version of the CUDA driver, and what follows from it.
#pragma once

#include <string>

#include "runtime.cuh"

#if defined(__CUDACC__)
#include <dlfcn.h>
#endif

namespace talib_fast {

// The newest CUDA that the driver serves, as CUDART_VERSION writes it (13010 is 13.1); 0 if there is no driver.
inline int driver_version() {
#if defined(__CUDACC__)
  // not by cudaDriverGetVersion, which initialises CUDA: a process forked after that could not use it
  static const int version = [] {
    int found = 0;
    if (void* driver = dlopen("libcuda.so.1", RTLD_NOW))
      if (void* get = dlsym(driver, "cuDriverGetVersion")) reinterpret_cast<int (*)(int*)>(get)(&found);
    return found;
  }();
  return version;
#else
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
#endif
}

// Whether a driver for one CUDA runs kernels of another: it runs those of its own major version and of older ones. 0
// stands for no driver.
constexpr bool driver_serves(int driver, int kernels) { return driver == 0 || driver / 1000 >= kernels / 1000; }
static_assert(driver_serves(13000, 13020) && driver_serves(14000, 13020) && driver_serves(0, 13000));
static_assert(!driver_serves(12090, 13000));

// Why no kernel is registered, and PyTorch's implementations serve every GPU; empty if kernels are registered.
inline std::string unserved_by_driver() {
#if defined(__CUDACC__)
  const int driver = driver_version();
  if (driver_serves(driver, CUDART_VERSION)) return "";
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "the kernels are of CUDA " + text(CUDART_VERSION) + ", and the driver serves CUDA " + text(driver);
#else
  return "";
#endif
}

// Whether a launch takes 32 KB of parameters, not 4 KB.
inline bool driver_takes_many_parameters() { return driver_version() >= 12010; }

}  // namespace talib_fast
