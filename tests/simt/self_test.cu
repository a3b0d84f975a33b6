// self_test               runs every test and every correct twin
// self_test NAME          runs one of them
// self_test NAME planted  runs the kernel with the planted bug
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "planted_bugs.cuh"
#include "runtime_kernels.cuh"

namespace {

using namespace talib_fast;

#if defined(__CUDACC__)
const cudaStream_t kStream = nullptr;
#else
const cudaStream_t kStream = simt::current_stream();
#endif

#define EXPECT(condition)                                                       \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(2);                                                             \
    }                                                                           \
  } while (false)

#define EXPECT_ALL(values, wanted)                 \
  for (const auto& value : values) {               \
    EXPECT(static_cast<float>(value) == (wanted)); \
  }

// ------------------------------------------------------------------------------------------------ runtime.cuh's
// promises

template <typename T, int V>
void test_scale_and_sum() {
  constexpr int kElements = 1000 * V;
  std::unique_ptr<Vector<T, V>[]> x(new Vector<T, V>[1000]), y(new Vector<T, V>[1000]), copy(new Vector<T, V>[1000]);
  std::vector<acc_t<T>> partial(64);
  acc_t<T> total = 0, expected = 0;
  unsigned arrived = 7;
  for (int i = 0; i < kElements; ++i) {
    x[i / V].lane[i % V] = from_acc<T>(static_cast<acc_t<T>>(i % 9));
    expected += static_cast<acc_t<T>>(2 * (i % 9));
  }
  launch_scale_and_sum<T, V>(x[0].lane, y[0].lane, copy[0].lane, 2, kElements, partial.data(), &arrived, &total,
                             kStream);
  EXPECT(total == expected);
  for (int i = 0; i < kElements; ++i) {
    EXPECT(to_acc(y[i / V].lane[i % V]) == 2 * (i % 9));
    EXPECT(to_acc(copy[i / V].lane[i % V]) == i % 9);
  }
}

template <typename T>
void test_collect_from_others() {
  std::vector<T> slots(4), sum(1);
  unsigned arrived = 0;
  launch_collect_from_others(slots.data(), &arrived, sum.data(), 5, 8, kStream);
  EXPECT(to_acc(sum[0]) == 4 * 28 + 8 * (0 + 1 + 2 + 3));
}

void test_kernels(bool) {
  test_scale_and_sum<float, 4>();
  test_scale_and_sum<float, 1>();
  test_scale_and_sum<double, 2>();
  test_scale_and_sum<__half, 8>();
  test_scale_and_sum<__half, 2>();
  test_scale_and_sum<__nv_bfloat16, 8>();
  test_scale_and_sum<__nv_bfloat16, 4>();
  test_collect_from_others<float>();
  test_collect_from_others<double>();
  test_collect_from_others<__half>();
}

void test_device_functions(bool) {
  std::vector<float> out(64 * kDeviceFunctions);
  launch_device_functions(out.data(), kStream);
  for (unsigned thread = 0; thread < 64; ++thread) {
    const unsigned lane = thread % 32;
    const float expected[kDeviceFunctions] = {3,
                                              static_cast<float>(lane % 8 == 7 ? lane : lane + 1),
                                              static_cast<float>(lane < 2 ? lane : lane - 2),
                                              5,
                                              1,
                                              0.75,
                                              13,
                                              9,
                                              9,
                                              35,
                                              3,
                                              2,
                                              0x1p-46f,
                                              1};
    for (int i = 0; i < kDeviceFunctions; ++i) {
      EXPECT(out[thread * kDeviceFunctions + i] == expected[i]);
    }
  }
}

template <typename T>
T from_bits(unsigned bits) {
  const unsigned short narrow = static_cast<unsigned short>(bits);
  T value;
  std::memcpy(static_cast<void*>(&value), &narrow, 2);
  return value;
}

template <typename T>
unsigned to_bits(T value) {
  unsigned short bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}

// All finite values come back. A value between two neighbours becomes the nearer one, and halfway the even one.
template <typename T>
void test_rounding(unsigned infinity, double beyond_largest) {
  const float inf = std::numeric_limits<float>::infinity();
  for (unsigned sign : {0u, 0x8000u}) {
    const float direction = sign ? -inf : inf;
    for (unsigned bits = 0; bits < infinity; ++bits) {
      const float value = to_acc(from_bits<T>(sign | bits));
      const double next =
          bits + 1 < infinity ? to_acc(from_bits<T>(sign | (bits + 1))) : std::copysign(beyond_largest, value);
      const float middle = static_cast<float>((value + next) / 2);
      EXPECT(to_bits(from_acc<T>(value)) == (sign | bits));
      EXPECT(to_bits(from_acc<T>(std::nextafter(middle, 0.0f))) == (sign | bits));
      EXPECT(to_bits(from_acc<T>(middle)) == (sign | (bits + bits % 2)));
      EXPECT(to_bits(from_acc<T>(std::nextafter(middle, direction))) == (sign | (bits + 1)));
    }
    EXPECT(to_acc(from_bits<T>(sign | infinity)) == direction);
    EXPECT(to_bits(from_acc<T>(direction)) == (sign | infinity));
    for (unsigned bits = infinity + 1; bits < 0x8000; ++bits) {
      EXPECT(std::isnan(to_acc(from_bits<T>(sign | bits))));
    }
  }
  EXPECT(std::isnan(to_acc(from_acc<T>(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT(std::isnan(to_acc(from_acc<T>(-std::numeric_limits<float>::signaling_NaN()))));
}

void test_conversions(bool) {
  test_rounding<__half>(0x7c00, 0x1p16);
  test_rounding<__nv_bfloat16>(0x7f80, 0x1p128);
}

void test_errors(bool) {
  check(cudaSuccess, "nothing");
  try {
    check(cudaErrorInvalidValue, "cudaSomething");
  } catch (const std::runtime_error& error) {
    EXPECT(error.what() == std::string("cudaSomething: cudaErrorInvalidValue: invalid argument"));
  }
  bool thrown = false;
  try {
    check(cudaSetDevice(-1), "cudaSetDevice");
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  EXPECT(thrown && cudaGetLastError() == cudaSuccess);  // the next launch does not see the error
}

void print_settings(bool) {
  int multiprocessors = 0, shared_bytes = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "shared memory");
  std::printf("%d multiprocessors, %d bytes of shared memory\n", multiprocessors, shared_bytes);
}

// ----------------------------------------------------------------------------------------------------- planted bugs

#define LAUNCH(kernel, grid, block, dynamic_bytes, ...)                           \
  if (planted) {                                                                  \
    SIMT_LAUNCH(kernel<true>, grid, block, dynamic_bytes, kStream, __VA_ARGS__);  \
  } else {                                                                        \
    SIMT_LAUNCH(kernel<false>, grid, block, dynamic_bytes, kStream, __VA_ARGS__); \
  }

void run_missing_barrier(bool planted) {
  std::vector<float> out(64);
  LAUNCH(missing_barrier, 1, 64, 0, out.data());
  EXPECT(planted || (out[0] == 1 && out[63] == 0));
}

void run_missing_later_barrier(bool planted) {
  std::vector<float> out(64);
  LAUNCH(missing_later_barrier, 1, 64, 0, out.data());
  EXPECT(planted || (out[63] == 2 && out[0] == 0));
}

void run_missing_warp_barrier(bool planted) {
  std::vector<float> out(32);
  LAUNCH(missing_warp_barrier, 1, 32, 0, out.data());
  EXPECT(planted || (out[0] == 1 && out[31] == 30));
}

void run_overlapping_blocks(bool planted) {
  std::vector<float> out(32);
  LAUNCH(overlapping_blocks, 4, 8, 0, out.data());
  EXPECT(planted || out[31] == 1);
}

void run_shared_overflow(bool planted) {
  std::vector<float> out(32);
  LAUNCH(shared_overflow, 1, 32, 0, out.data());
  EXPECT_ALL(out, 1);
}

void run_dynamic_shared_overflow(bool planted) {
  std::vector<float> out(32);
  LAUNCH(dynamic_shared_overflow, 1, 32, 32 * sizeof(float), out.data());
  EXPECT_ALL(out, 1);
}

void run_global_overflow(bool planted) {
  std::vector<float> out(64);
  LAUNCH(global_overflow, 2, 32, 0, out.data());
  EXPECT_ALL(out, 1);
}

void run_misaligned_vector(bool planted) {
  std::vector<float> in(33, 1.0f), out(32);
  LAUNCH(misaligned_vector, 1, 8, 0, in.data(), out.data());
  EXPECT_ALL(out, 1);
}

void run_divergent_barrier(bool planted) {
  std::vector<float> out(40);
  LAUNCH(divergent_barrier, 1, 40, 0, out.data());
  EXPECT_ALL(out, 3);
}

void run_deadlock(bool planted) {
  std::vector<float> out(32);
  LAUNCH(deadlock, 1, 32, 0, out.data());
  EXPECT_ALL(out, 1);
}

void run_divergent_shuffle(bool planted) {
  std::vector<float> out(32);
  LAUNCH(divergent_shuffle, 1, 32, 0, out.data());
  EXPECT_ALL(out, 2);
}

void run_absent_lanes(bool planted) {
  std::vector<float> out(48);
  LAUNCH(absent_lanes, 1, 48, 0, out.data());
  EXPECT(out[0] == 32 && out[32] == 16);
}

void run_wrong_mask(bool planted) {
  std::vector<float> out(32);
  LAUNCH(wrong_mask, 1, 32, 0, out.data());
  EXPECT_ALL(out, 1);
}

void run_missing_release(bool planted) {
  float value = 0, out = 0;
  unsigned ready = 0;
  LAUNCH(missing_release, 2, 1, 0, &value, &ready, &out);
  EXPECT(out == 2);
}

void run_missing_acquire(bool planted) {
  float value = 0, out = 0;
  unsigned ready = 0;
  LAUNCH(missing_acquire, 2, 1, 0, &value, &ready, &out);
  EXPECT(out == 2);
}

void run_endless_wait(bool planted) {
  unsigned ready = 0;
  LAUNCH(endless_wait, 2, 1, 0, &ready);
  EXPECT(ready == 1);
}

void run_uninitialised_shared(bool planted) {
  std::vector<float> out(32);
  LAUNCH(uninitialised_shared, 1, 32, 0, out.data());
  EXPECT(out[0] == 1 && std::isnan(out[31]) == planted);
}

void run_static_and_dynamic_shared(bool planted) {
  std::vector<float> out(32);
  const int bytes = (48 << 10) - 32 * static_cast<int>(sizeof(float));
  LAUNCH(static_and_dynamic_shared, 1, 32, bytes, out.data());
  EXPECT_ALL(out, 3);
}

void run_other_stream(bool planted) {
  std::vector<float> out(32);
  SIMT_LAUNCH(wrong_mask<false>, 1, 32, 0, planted ? nullptr : kStream, out.data());
  EXPECT_ALL(out, 1);
}

// A limit that is set for a launch, after a larger limit.
void run_lowered_limit(bool planted) {
  for (const int bytes : {1024, planted ? 512 : 1024}) {
    check(cudaFuncSetAttribute(dynamic_shared_overflow<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "cudaFuncSetAttribute");
  }
}

struct ManyParameters {
  float values[1025];
};

template <bool kPlanted>
__global__ void many_parameters(const __grid_constant__ ManyParameters parameters, float* out) {
  out[threadIdx.x] = parameters.values[threadIdx.x];
}

void run_many_parameters(bool planted) {
  std::vector<float> out(32, 1.0f);
  int driver = 0;
  if (!planted) {
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  }
  LAUNCH(many_parameters, 1, 32, 0, ManyParameters{}, out.data());
  EXPECT_ALL(out, 0);
}

// More dynamic shared memory than a kernel may use without asking for it.
void run_ungranted_shared(bool planted) {
  std::vector<float> out(32);
  SIMT_LAUNCH(dynamic_shared_overflow<false>, 1, 32, (48 << 10) + (planted ? 1 : 0), kStream, out.data());
  EXPECT_ALL(out, 1);
}

struct Test {
  const char* name;
  void (*run)(bool planted);
};

const Test kTests[] = {
    {"kernels", test_kernels},
    {"device_functions", test_device_functions},
    {"conversions", test_conversions},
    {"errors", test_errors},
    {"settings", print_settings},
    {"missing_barrier", run_missing_barrier},
    {"missing_later_barrier", run_missing_later_barrier},
    {"missing_warp_barrier", run_missing_warp_barrier},
    {"overlapping_blocks", run_overlapping_blocks},
    {"shared_overflow", run_shared_overflow},
    {"dynamic_shared_overflow", run_dynamic_shared_overflow},
    {"global_overflow", run_global_overflow},
    {"misaligned_vector", run_misaligned_vector},
    {"divergent_barrier", run_divergent_barrier},
    {"deadlock", run_deadlock},
    {"divergent_shuffle", run_divergent_shuffle},
    {"absent_lanes", run_absent_lanes},
    {"wrong_mask", run_wrong_mask},
    {"missing_release", run_missing_release},
    {"missing_acquire", run_missing_acquire},
    {"endless_wait", run_endless_wait},
    {"uninitialised_shared", run_uninitialised_shared},
    {"static_and_dynamic_shared", run_static_and_dynamic_shared},
    {"ungranted_shared", run_ungranted_shared},
    {"other_stream", run_other_stream},
    {"lowered_limit", run_lowered_limit},
    {"many_parameters", run_many_parameters},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  for (const Test& test : kTests) {
    if (wanted.empty() || wanted == test.name) {
      test.run(argc > 2);
      std::printf("%s: passed\n", test.name);
    }
  }
}
