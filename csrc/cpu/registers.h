// Values in 64-byte lanes of the accumulation dtype: their types, and what is done with them in registers.
#pragma once

#include "../types.h"
#include "processor.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace talib_fast {
namespace {

using c10::BFloat16;
using c10::Half;

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(a value of that type)
template <typename F>
void with_type(FloatType type, const F& f) {
  with_type<Half, BFloat16>(type, f);
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

// What GCC makes of comparisons, and of conversions to and from 16 bits, depends on whether a register holds all lanes.
// Where a or b is NaN, less(a, b) holds, and min and max give b.
template <bool kWide>
struct Registers;

// For registers that hold a part of the lanes. GCC would take a comparison apart, lane by lane, so a condition is a
// mask made of sign bits.
template <>
struct Registers<false> {
  static constexpr bool kBranches = false;  // whether vectors stay in registers where branches meet

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
  template <typename V, typename Of = Lanes<std::remove_cvref_t<decltype(V{}[0])>>>
  static INLINE typename Of::mask not_zero(const V& lanes) {
    const auto bits = bits_of<typename Of::mask>(lanes);
    return signs(bits | -bits);
  }
  template <typename V, typename Of = Lanes<std::remove_cvref_t<decltype(V{}[0])>>>
  static INLINE typename Of::mask first(int64_t n) {
    return signs(Of::kNumbers - (typename Of::mask{} + static_cast<int>(n)));
  }
  template <typename V, typename Of = Lanes<std::remove_cvref_t<decltype(V{}[0])>>>
  static INLINE typename Of::mask all() {
    return typename Of::mask{} - 1;
  }
  template <typename Mask, typename R>
  static INLINE R select(const Mask& mask, const R& yes, const R& no) {
    return bits_of<R>((mask & bits_of<Mask>(yes)) | (~mask & bits_of<Mask>(no)));
  }
  template <typename V>
  static INLINE V min(const V& a, const V& b) {
    return select(less(b, a), b, a);
  }
  template <typename V>
  static INLINE V max(const V& a, const V& b) {
    return select(less(a, b), b, a);
  }

  template <typename V>
  static INLINE V reciprocal(const V& a) {
    return 1 / a;
  }

  template <typename V, typename Of = Lanes<std::remove_cvref_t<decltype(V{}[0])>>>
  static INLINE typename Of::mask of_bits(int bits) {
    const auto chosen = Of::kBits & bits;
    return signs(chosen | -chosen);
  }
  template <typename Mask>
  static INLINE uint32_t bits(const Mask& mask) {
    constexpr int kLanes = sizeof(mask) / sizeof(mask[0]);
#if defined(__SSE2__)
    __m128i parts[4];
    __builtin_memcpy(parts, &mask, sizeof(mask));
    __m128i low = _mm_packs_epi32(parts[0], parts[1]), high = _mm_packs_epi32(parts[2], parts[3]);
    if constexpr (kLanes == 8) low = _mm_packs_epi32(low, high), high = __m128i{};
    return _mm_movemask_epi8(_mm_packs_epi16(low, high));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1) << i;
    return bits;
#endif
  }

  static INLINE Bits widen(const Words& words) { return __builtin_convertvector(words, Bits); }
  static INLINE Floats load(const Words& words, BFloat16) { return bits_of<Floats>(widen(words) << 16); }
  static INLINE Floats load(const Words& words, Half) {
    const Bits bits = widen(words), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    // rebias the exponent, infinities and NaN twice; a subnormal's mantissa counts steps of 2^-24
    const Bits rebias = select(less(magnitude, Bits{} + 0x7c00), Bits{} + (112u << 23), Bits{} + (224u << 23));
    const Bits normal = (magnitude << 13) + rebias;
    const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude + (126u << 23)) - 0.5f);
    return bits_of<Floats>(sign | select(less(magnitude, Bits{} + 0x400), subnormal, normal));
  }
  // rounded to nearest, ties to even
  static INLINE Words store(const Floats& lanes, BFloat16) {
    const Bits bits = bits_of<Bits>(lanes), rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const auto nan = less(Bits{} + 0x7f800000, bits & 0x7fffffff);
    return __builtin_convertvector(select(nan, Bits{} + 0x7fc00000, rounded) >> 16, Words);
  }
  static INLINE Words store(const Floats& lanes, Half) {
    const Bits bits = bits_of<Bits>(lanes), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Bits subnormal = bits_of<Bits>(bits_of<Floats>(magnitude) + 0.5f) - (126u << 23);  // the addition rounds
    const Bits finite = select(less(magnitude, Bits{} + (113u << 23)), subnormal, normal);
    const Bits large = select(less(Bits{} + 0x7f800000, magnitude), Bits{} + 0x7e00, Bits{} + 0x7c00);
    return __builtin_convertvector(sign | select(less(magnitude, Bits{} + ((143u << 23) - 0x1000)), finite, large),
                                   Words);
  }
};

#if defined(SIMD_WIDE)
// For registers that hold all lanes. A condition is a bit for each lane, the first one's lowest. Instructions have
// GCC's own names, because intrinsics may not be inlined into a template that is not for AVX-512 alone.
template <>
struct Registers<true> {
  static constexpr bool kBranches = true;
  typedef Lanes<double>::type Doubles;
  typedef int16_t Shorts __attribute__((vector_size(32)));
  typedef int16_t AllShorts __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef long long Longs __attribute__((vector_size(64)));
  typedef long long HalfLongs __attribute__((vector_size(32)));
  static constexpr int kAll = -1, kAsSet = 4;             // lanes; how results are rounded
  static constexpr int kLess = 1, kLessOrUnordered = 25;  // comparisons

  static INLINE int less(const Floats& a, const Floats& b) {
    return static_cast<uint16_t>(__builtin_ia32_cmpps512_mask(a, b, kLessOrUnordered, kAll, kAsSet));
  }
  static INLINE int less(const Doubles& a, const Doubles& b) {
    return static_cast<uint8_t>(__builtin_ia32_cmppd512_mask(a, b, kLessOrUnordered, kAll, kAsSet));
  }
  static INLINE int not_zero(const Floats& lanes) {
    const auto bits = bits_of<Lanes<float>::mask>(lanes);
    return static_cast<uint16_t>(__builtin_ia32_ptestmd512(bits, bits, kAll));
  }
  static INLINE int not_zero(const Doubles& lanes) {
    const auto bits = bits_of<Longs>(lanes);
    return static_cast<uint8_t>(__builtin_ia32_ptestmq512(bits, bits, kAll));
  }
  template <typename V>
  static INLINE int first(int64_t n) {
    return (1 << n) - 1;
  }
  template <typename V>
  static INLINE int all() {
    return kAll;
  }
  static INLINE Floats select(int condition, const Floats& yes, const Floats& no) {
    return __builtin_ia32_blendmps_512_mask(no, yes, condition);
  }
  static INLINE Doubles select(int condition, const Doubles& yes, const Doubles& no) {
    return __builtin_ia32_blendmpd_512_mask(no, yes, condition);
  }
  static INLINE Floats min(const Floats& a, const Floats& b) {
    return __builtin_ia32_minps512_mask(a, b, Floats{}, kAll, kAsSet);
  }
  static INLINE Doubles min(const Doubles& a, const Doubles& b) {
    return __builtin_ia32_minpd512_mask(a, b, Doubles{}, kAll, kAsSet);
  }
  static INLINE Floats max(const Floats& a, const Floats& b) {
    return __builtin_ia32_maxps512_mask(a, b, Floats{}, kAll, kAsSet);
  }
  static INLINE Doubles max(const Doubles& a, const Doubles& b) {
    return __builtin_ia32_maxpd512_mask(a, b, Doubles{}, kAll, kAsSet);
  }

  // of a normal number, whose reciprocal is one; to the last bit or two
  static INLINE Floats reciprocal(const Floats& a) {
    const Floats near = __builtin_ia32_rcp14ps512_mask(a, Floats{}, kAll);
    return near + near * (1 - a * near);
  }
  static INLINE Doubles reciprocal(const Doubles& a) { return 1 / a; }

  template <typename V>
  static INLINE int of_bits(int bits) {
    return bits;
  }
  static INLINE uint32_t bits(int condition) { return condition; }

  static INLINE Floats load(const Words& words, BFloat16) {
    const Ints wide = __builtin_ia32_pmovzxwd512_mask(bits_of<Shorts>(words), Ints{}, kAll);
    return bits_of<Floats>(wide << 16);
  }
  static INLINE Floats load(const Words& words, Half) {
    return __builtin_ia32_vcvtph2ps512_mask(bits_of<Shorts>(words), Floats{}, kAll, kAsSet);
  }
  // Rounded to nearest, ties to even: upwards where the lower half, and the upper one's last bit, exceed a half. NaN,
  // of which arithmetic leaves a bit in the upper half, stays as it is.
  static INLINE AllShorts store(const Floats& a, const Floats& b, BFloat16) {
    constexpr AllShorts kLower = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                  32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    constexpr int16_t kHalf = -0x8000, kSign = -0x8000, kInfinity = -0x80;  // the last one with the sign set
    const AllShorts first = bits_of<AllShorts>(a), second = bits_of<AllShorts>(b);
    const AllShorts lower = __builtin_shuffle(first, second, kLower);
    const AllShorts upper = __builtin_shuffle(first, second, kLower + 1);
    const AllShorts excess = __builtin_ia32_paddusw512_mask(lower, upper & 1, AllShorts{}, kAll);
    const auto finite = __builtin_ia32_ucmpw512_mask(upper | kSign, AllShorts{} + kInfinity, kLess, kAll);
    const auto up = __builtin_ia32_ucmpw512_mask(AllShorts{} + kHalf, excess, kLess, finite);
    return __builtin_ia32_paddw512_mask(upper, AllShorts{} + 1, upper, up);
  }
  static INLINE Words store(const Floats& lanes, BFloat16) {
    const AllShorts both = store(lanes, lanes, BFloat16{});
    Words first;
    __builtin_memcpy(&first, &both, sizeof(first));
    return first;
  }
  static INLINE Words store(const Floats& lanes, Half) {
    return bits_of<Words>(__builtin_ia32_vcvtps2ph512_mask(lanes, 0, Shorts{}, kAll));
  }

  template <typename V>
  static INLINE void stream(void* to, const V& value) {
    if constexpr (sizeof(V) == 64) __builtin_ia32_movntdq512(static_cast<Longs*>(to), bits_of<Longs>(value));
    else __builtin_ia32_movntdq256(static_cast<HalfLongs*>(to), bits_of<HalfLongs>(value));
  }
};
#endif

}  // namespace
}  // namespace talib_fast
