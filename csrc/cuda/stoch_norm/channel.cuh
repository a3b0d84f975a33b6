// Loads and stores numbers of one channel, whose dtype is chosen at run time; finds the sign of one element.
#pragma once

#include "../../types.h"
#include "../runtime.cuh"

#include <cstdint>

namespace talib_fast::stoch_norm {

template <int V, typename F>
__device__ __forceinline__ void for_each_lane(const F& f) {
#pragma unroll
  for (int lane = 0; lane < V; ++lane) f(lane);
}

template <typename A>
__device__ __forceinline__ A load(const ChannelVector& vector, int64_t c) {
  A value{};
  with_type(vector.type, [&](auto zero) {
    value = static_cast<A>(to_acc(static_cast<const decltype(zero)*>(vector.data)[c * vector.stride]));
  });
  return value;
}

template <typename A>
__device__ __forceinline__ A load_or(const ChannelVector& vector, int64_t c, A absent) {
  return vector.data == nullptr ? absent : load<A>(vector, c);
}

template <typename A>
__device__ __forceinline__ void store(const ChannelVector& vector, int64_t c, A value) {
  with_type(vector.type, [&](auto zero) {
    using T = decltype(zero);
    static_cast<T*>(vector.data)[c * vector.stride] = from_acc<T>(static_cast<acc_t<T>>(value));
  });
}

// An element's sign is this bit of this word. Unsigned arithmetic makes them a mask and a shift.
__device__ __forceinline__ unsigned sign_bit(int64_t at) { return static_cast<unsigned>(at) % kSignsPerWord; }
__device__ __forceinline__ uint64_t sign_word(int64_t at) { return static_cast<uint64_t>(at) / kSignsPerWord; }

}  // namespace talib_fast::stoch_norm
