// The CUDA driver, asked without the CUDA runtime, which may not be there.
#pragma once

#include <dlfcn.h>

namespace talib_fast {

// The newest CUDA that the driver serves, as CUDART_VERSION writes it (13010 is 13.1); 0 if there is no driver.
inline int driver_version() {
  static const int version = [] {
    int found = 0;
    if (void* driver = dlopen("libcuda.so.1", RTLD_NOW))
      if (void* get = dlsym(driver, "cuDriverGetVersion")) reinterpret_cast<int (*)(int*)>(get)(&found);
    return found;
  }();
  return version;
}

}  // namespace talib_fast
