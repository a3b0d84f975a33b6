// Values in 64-byte lanes, whatever registers the processor has for them: to and from memory, and their bits.
#pragma once

#include "registers.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cstdint>
#include <type_traits>

namespace talib_fast {
namespace {

template <bool kWide = false, typename T>
INLINE lanes_t<T> load_lanes(const T* from) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    lanes_t<T> lanes;
    __builtin_memcpy(&lanes, from, sizeof(lanes));
    return lanes;
  } else {
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    return Registers<kWide>::load(words, T{});
  }
}

// Stores a vector. With kStream it goes past the caches, which then need not read the line before, nor hold what is not
// used again soon; `to` is then aligned as V is.
template <bool kStream, bool kWide, typename V>
INLINE void put(void* to, const V& value) {
#if defined(SIMD_WIDE)
  if constexpr (kStream && kWide) return Registers<true>::stream(to, value);
#endif
#if defined(__SSE2__)
  if constexpr (kStream) {
    __m128i parts[sizeof(V) / 16];
    __builtin_memcpy(parts, &value, sizeof(value));
#pragma GCC unroll 4
    for (size_t i = 0; i < sizeof(V) / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, parts[i]);
    return;
  }
#endif
  __builtin_memcpy(to, &value, sizeof(value));
}

// After this, other threads see what was streamed.
inline void settle([[maybe_unused]] bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#endif
}

template <bool kStream = false, bool kWide = false, typename T>
INLINE void store_lanes(T* to, const lanes_t<T>& lanes) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) put<kStream, kWide>(to, lanes);
  else put<kStream, kWide>(to, Registers<kWide>::store(lanes, T{}));
}

// One after the other.
template <bool kStream, bool kWide, typename T, int kCount>
INLINE void store_lanes(T* to, const lanes_t<T> (&lanes)[kCount]) {
  if constexpr (kWide && kCount == 2 && std::is_same_v<T, BFloat16>) {
    put<kStream, kWide>(to, Registers<kWide>::store(lanes[0], lanes[1], T{}));
  } else {
#pragma GCC unroll 2
    for (int i = 0; i < kCount; ++i) store_lanes<kStream, kWide>(to + i * kLanes<T>, lanes[i]);
  }
}

// Loads `n` lanes, where memory may end behind them; the others are 0.
template <bool kWide, typename T>
INLINE lanes_t<T> load_first(const T* from, int64_t n) {
  alignas(64) T values[kLanes<T>] = {};
  __builtin_memcpy(values, from, n * sizeof(T));
  return load_lanes<kWide>(values);
}

template <bool kWide, typename T>
INLINE void store_first(T* to, const lanes_t<T>& lanes, int64_t n) {
  alignas(64) T values[kLanes<T>];
  store_lanes<false, kWide>(values, lanes);
  __builtin_memcpy(to, values, n * sizeof(T));
}

// The bits of `n` elements from `at` on, in the order of memory.
template <typename Unit>
INLINE int read_bits(const Unit* units, uint64_t at, int64_t n) {
  constexpr int kBits = 8 * sizeof(Unit);
  const uint32_t low = units[at / kBits], high = units[(at + n - 1) / kBits];
  return (low | high << kBits) >> at % kBits;
}

// Writes the bits of `n` elements from `at` on. A unit that is not written as a whole may be shared with other threads,
// and has to be 0 before.
template <typename Unit>
INLINE void write_bits(Unit* units, uint64_t at, int64_t n, uint32_t bits) {
  constexpr int kBits = 8 * sizeof(Unit);
  if (n == kBits && at % kBits == 0) {
    units[at / kBits] = static_cast<Unit>(bits);
    return;
  }
  const uint32_t placed = (bits & ((1u << n) - 1)) << at % kBits;
  __atomic_fetch_or(&units[at / kBits], static_cast<Unit>(placed), __ATOMIC_RELAXED);
  if (placed >> kBits != 0)
    __atomic_fetch_or(&units[at / kBits + 1], static_cast<Unit>(placed >> kBits), __ATOMIC_RELAXED);
}

template <typename T>
INLINE double total(const lanes_t<T>& lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += lanes[i];
  return sum;
}

}  // namespace
}  // namespace talib_fast
