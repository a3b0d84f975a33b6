// Values in 64-byte lanes of the accumulation dtype, whatever registers the processor has for them.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../types.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // which has no name for these levels
#define SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SIMD_CLONES
#endif
// what a clone calls has to be compiled with it, so that no vector is ever passed in a register of another size
#define INLINE inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace talib_fast {
namespace {

using c10::BFloat16;
using c10::Half;

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(a value of that type)
template <typename F>
void dispatch(FloatType type, const F& f) {
  with_float<Half, BFloat16>(type, f);
}

template <typename A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <typename T>
using lanes_t = typename Lanes<acc_t<T>>::type;
template <typename T>
constexpr int64_t kLanes = 64 / sizeof(acc_t<T>);

typedef uint16_t Words __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef Lanes<float>::type Floats;

template <typename To, typename From>
INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
INLINE lanes_t<T> load_lanes(const T* from) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    lanes_t<T> lanes;
    __builtin_memcpy(&lanes, from, sizeof(lanes));
    return lanes;
  } else {
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    const Bits bits = __builtin_convertvector(words, Bits);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return bits_of<Floats>(bits << 16);
    } else {
      const Bits sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
      // rebias the exponent, infinities and NaN twice; a subnormal's mantissa counts steps of 2^-24
      const Bits rebias = (magnitude >= 0x7c00) ? Bits{} + (224u << 23) : Bits{} + (112u << 23);
      const Bits normal = (magnitude << 13) + rebias;
      const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude + (126u << 23)) - 0.5f);
      return bits_of<Floats>(sign | (magnitude < 0x400 ? subnormal : normal));
    }
  }
}

// With kStream past the caches, which need not read first what will be gone from them before it is used again; `to` is
// then aligned to 16 bytes.
template <bool kStream, typename V>
INLINE void put(void* to, const V& value) {
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

// Other threads see what was streamed after this.
inline void settle(bool streamed) {
#if defined(__SSE2__)
  if (streamed) _mm_sfence();
#endif
}

template <bool kStream = false, typename T>
INLINE void store_lanes(T* to, const lanes_t<T>& lanes) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    put<kStream>(to, lanes);
  } else {
    const Bits bits = bits_of<Bits>(lanes), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const auto nan = magnitude > 0x7f800000;
    Bits rounded;  // to nearest, ties to even
    if constexpr (std::is_same_v<T, BFloat16>) {
      rounded = sign | (nan ? Bits{} + 0x7fc0 : (magnitude + 0x7fff + ((magnitude >> 16) & 1)) >> 16);
    } else {
      const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
      const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude) + 0.5f) - (126u << 23);  // the addition rounds
      const Bits finite = magnitude < (113u << 23) ? subnormal : normal;
      const Bits large = nan ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
      rounded = sign | (magnitude >= (143u << 23) - 0x1000 ? large : finite);
    }
    const Words words = __builtin_convertvector(rounded, Words);
    put<kStream>(to, words);
  }
}

template <typename T>
INLINE double total(const lanes_t<T>& lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += lanes[i];
  return sum;
}

}  // namespace
}  // namespace talib_fast
