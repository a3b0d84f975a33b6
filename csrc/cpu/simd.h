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
#define SIMD_ARCH "arch="
#define SIMD_WIDE "x86-64-v4"
#define SIMD_MIDDLE "x86-64-v3"
#else  // which has no name for these levels
#define SIMD_ARCH ""
#define SIMD_WIDE "avx512f"
#define SIMD_MIDDLE "avx2"
#endif
#define SIMD_CLONES __attribute__((target_clones(SIMD_ARCH SIMD_WIDE, SIMD_ARCH SIMD_MIDDLE, "default")))
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
  typedef int32_t mask __attribute__((vector_size(64)));  // what a comparison gives: all bits of a lane, or none
  typedef uint16_t bits;                                  // one for each lane, the first one's lowest
  static constexpr int32_t kMantissa = 0x7fffff;
  static constexpr mask kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static constexpr mask kBits = {1 << 0, 1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                                 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(64)));
  typedef int64_t mask __attribute__((vector_size(64)));
  typedef uint8_t bits;
  static constexpr int64_t kMantissa = 0xfffffffffffff;
  static constexpr mask kNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
  static constexpr mask kBits = {1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7};
};
template <typename T>
using lanes_t = typename Lanes<acc_t<T>>::type;
template <typename T>
using mask_t = typename Lanes<acc_t<T>>::mask;
template <typename T>
using bits_t = typename Lanes<acc_t<T>>::bits;
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

#if defined(SIMD_WIDE)
template <typename Body, typename... Args>
__attribute__((target(SIMD_ARCH SIMD_WIDE))) void run_wide(Args... args) {
  Body::template run<true>(args...);
}
template <typename Body, typename... Args>
__attribute__((target(SIMD_ARCH SIMD_MIDDLE))) void run_middle(Args... args) {
  Body::template run<false>(args...);
}
#endif

// Body::run<whether a register holds all lanes>(args...), compiled for the registers that there are. Clones do not know
// which of them they are.
template <typename Body, typename... Args>
void simd(Args... args) {
#if defined(SIMD_WIDE)
  static const bool wide = __builtin_cpu_supports(SIMD_WIDE), middle = __builtin_cpu_supports(SIMD_MIDDLE);
  if (wide) return run_wide<Body>(args...);
  if (middle) return run_middle<Body>(args...);
#endif
  Body::template run<false>(args...);
}

// Conditions, and what is chosen by them. GCC takes a comparison of vectors apart, lane by lane, unless a register
// holds all lanes and the comparison is a selection's own. There a condition is what is to be compared, elsewhere a
// mask made of signs.
template <bool kWide>
struct Conditions;

template <>
struct Conditions<true> {
  template <typename V>
  struct Less {  // or one of them is NaN
    V a, b;
    template <typename R>
    INLINE R select(const R& yes, const R& no) const {
      return a >= b ? no : yes;
    }
  };
  template <typename Mask>
  struct NotZero {
    Mask lanes;
    template <typename R>
    INLINE R select(const R& yes, const R& no) const {
      return lanes == 0 ? no : yes;
    }
  };

  template <typename V>
  static INLINE Less<V> less(const V& a, const V& b) {
    return {a, b};
  }
  template <typename Mask>
  static INLINE NotZero<Mask> not_zero(const Mask& lanes) {
    return {lanes};
  }
  template <typename Condition, typename R>
  static INLINE R select(const Condition& condition, const R& yes, const R& no) {
    return condition.select(yes, no);
  }
};

template <>
struct Conditions<false> {
  template <typename Mask>
  static INLINE Mask signs(const Mask& lanes) {
    return lanes >> (8 * sizeof(lanes[0]) - 1);
  }

  // a is not -0 where b is 0, and they are not both infinite
  template <typename V, typename Of = Lanes<std::remove_cvref_t<decltype(V{}[0])>>>
  static INLINE typename Of::mask less(const V& a, const V& b) {
    const auto difference = bits_of<typename Of::mask>(a - b);
    return signs(difference | (difference + Of::kMantissa));  // the sum sets the sign of a positive NaN
  }
  // integers between 0 and 2^31
  static INLINE Lanes<float>::mask less(const Bits& a, const Bits& b) {
    return signs(bits_of<Lanes<float>::mask>(a - b));
  }
  static INLINE auto less(const Lanes<float>::mask& a, const Lanes<float>::mask& b) { return signs(a - b); }
  static INLINE auto less(const Lanes<double>::mask& a, const Lanes<double>::mask& b) { return signs(a - b); }
  template <typename Mask>
  static INLINE Mask not_zero(const Mask& lanes) {
    return signs(lanes | -lanes);
  }
  template <typename Mask, typename R>
  static INLINE R select(const Mask& mask, const R& yes, const R& no) {
    return bits_of<R>((mask & bits_of<Mask>(yes)) | (~mask & bits_of<Mask>(no)));
  }
};

template <bool kWide = true, typename T>
INLINE lanes_t<T> load_lanes(const T* from) {
  using M = Conditions<kWide>;
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
      const Bits rebias = M::select(M::less(magnitude, Bits{} + 0x7c00), Bits{} + (112u << 23), Bits{} + (224u << 23));
      const Bits normal = (magnitude << 13) + rebias;
      const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude + (126u << 23)) - 0.5f);
      return bits_of<Floats>(sign | M::select(M::less(magnitude, Bits{} + 0x400), subnormal, normal));
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

template <bool kStream = false, bool kWide = true, typename T>
INLINE void store_lanes(T* to, const lanes_t<T>& lanes) {
  using M = Conditions<kWide>;
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    put<kStream>(to, lanes);
  } else {
    const Bits bits = bits_of<Bits>(lanes), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const auto nan = M::less(Bits{} + 0x7f800000, magnitude);
    Bits rounded;  // to nearest, ties to even
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Bits number = (magnitude + 0x7fff + ((magnitude >> 16) & 1)) >> 16;
      rounded = sign | M::select(nan, Bits{} + 0x7fc0, number);
    } else {
      const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
      const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude) + 0.5f) - (126u << 23);  // the addition rounds
      const Bits finite = M::select(M::less(magnitude, Bits{} + (113u << 23)), subnormal, normal);
      const Bits large = M::select(nan, Bits{} + 0x7e00, Bits{} + 0x7c00);
      rounded = sign | M::select(M::less(magnitude, Bits{} + ((143u << 23) - 0x1000)), finite, large);
    }
    const Words words = __builtin_convertvector(rounded, Words);
    put<kStream>(to, words);
  }
}

// The first `n` lanes of what may end there; the others are 0.
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

// A bit for each lane of a mask, the first one's lowest.
template <typename T>
INLINE uint32_t bits_of_mask(const mask_t<T>& mask) {
#if defined(__SSE2__)
  __m128i parts[4];
  __builtin_memcpy(parts, &mask, sizeof(mask));
  __m128i low = _mm_packs_epi32(parts[0], parts[1]), high = _mm_packs_epi32(parts[2], parts[3]);
  if constexpr (kLanes<T> == 8) low = _mm_packs_epi32(low, high), high = __m128i{};
  return _mm_movemask_epi8(_mm_packs_epi16(low, high));
#else
  uint32_t bits = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) bits |= (mask[i] & 1) << i;
  return bits;
#endif
}

// Bits of elements in the order of memory: those of `n` lanes from element `at` on.
template <typename Unit>
INLINE int read_bits(const Unit* units, uint64_t at, int64_t n) {
  constexpr int kBits = 8 * sizeof(Unit);
  const uint32_t low = units[at / kBits], high = units[(at + n - 1) / kBits];
  return (low | high << kBits) >> at % kBits;
}

// A unit that is not written as a whole may be shared with other threads, and has to be 0 before.
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
