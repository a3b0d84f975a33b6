// Code for the registers that the processor has, whichever the compiler was told of.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SIMD_ARCH "arch="
#define SIMD_WIDE "x86-64-v4"
#define SIMD_MIDDLE "x86-64-v3"
#define SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // which has no name for these levels, and makes no clones for AVX-512's further parts
#define SIMD_ARCH ""
#define SIMD_WIDE "avx512bw"
#define SIMD_MIDDLE "avx2"
#define SIMD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define SIMD_CLONES
#endif
// what a clone calls has to be compiled with it, so that no vector is ever passed in a register of another size
#define INLINE inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"
// before a loop: what an iteration stores no other one reads
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

// Whether `simd` has code for this processor. On x86-64 that takes AVX2: the baseline's code would be half of all.
inline bool processor_serves_kernels() {
#if defined(SIMD_WIDE)
  return __builtin_cpu_supports(SIMD_MIDDLE);
#else
  return true;
#endif
}

// Body::run<whether a register holds all lanes>(args...), compiled for the registers that there are. Clones do not know
// which of them they are.
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
