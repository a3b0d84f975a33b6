// Compiles loops for the registers of several processors, whichever the compiler was told of.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SIMD_ARCH "arch="
#define SIMD_WIDE "x86-64-v4"
#define SIMD_MIDDLE "x86-64-v3"
#define SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // older GCC: no names for these levels, no clones for AVX-512's further parts
#define SIMD_ARCH ""
#define SIMD_WIDE "avx512bw"
#define SIMD_MIDDLE "avx2"
#define SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SIMD_CLONES
#endif
// inlined into a clone, so that no vector is ever passed in a register of another size
#define INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"
// before a loop: no iteration reads what another one stores
#if defined(__clang__)
#define IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define IVDEP _Pragma("GCC ivdep")
#endif

namespace talib_fast {
namespace {

#if defined(SIMD_WIDE)
template <typename Body, typename... Args>
__attribute__((target(SIMD_ARCH SIMD_WIDE))) auto run_wide(Args... args) {
  return Body::template run<true>(args...);
}
template <typename Body, typename... Args>
__attribute__((target(SIMD_ARCH SIMD_MIDDLE))) auto run_middle(Args... args) {
  return Body::template run<false>(args...);
}
#endif

// Whether `simd` has code for this processor. On x86-64 that takes AVX2: code for the baseline would be half of all
// code.
inline bool processor_serves_kernels() {
#if defined(SIMD_WIDE)
  return __builtin_cpu_supports(SIMD_MIDDLE);
#else
  return true;
#endif
}

// Calls Body::run<whether a register holds all lanes>(args...), compiled for the registers of this processor.
// SIMD_CLONES cannot do that: a clone does not know which one it is.
template <typename Body, typename... Args>
auto simd(Args... args) {
#if defined(SIMD_WIDE)
  static const bool wide = __builtin_cpu_supports(SIMD_WIDE);
  return wide ? run_wide<Body>(args...) : run_middle<Body>(args...);
#else
  return Body::template run<false>(args...);
#endif
}

}  // namespace
}  // namespace talib_fast
