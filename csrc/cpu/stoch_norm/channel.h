// Numbers of one channel, whose dtype is chosen at run time.
#pragma once

#include "../../types.h"
#include "../simd.h"

#include <cstdint>

namespace talib_fast {
namespace {

INLINE double load(const ChannelVector& vector, int64_t c) {
  double value = 0;
  with_type(vector.type, [&](auto zero) {
    using T = decltype(zero);
    value = static_cast<acc_t<T>>(static_cast<const T*>(vector.data)[c * vector.stride]);
  });
  return value;
}

INLINE double load_or(const ChannelVector& vector, int64_t c, double absent) {
  return vector.data == nullptr ? absent : load(vector, c);
}

INLINE void store(const ChannelVector& vector, int64_t c, double value) {
  with_type(vector.type, [&](auto zero) {
    using T = decltype(zero);
    static_cast<T*>(vector.data)[c * vector.stride] = static_cast<T>(static_cast<acc_t<T>>(value));
  });
}

}  // namespace
}  // namespace talib_fast
