#include "../stoch_norm.h"

#include <sys/mman.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cmath>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SIMD_CLONES
#endif
// what a clone calls has to be compiled with it
#define INLINE inline __attribute__((always_inline))

namespace talib_fast {
namespace {

using c10::BFloat16;
using c10::Half;

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

INLINE double load(const ChannelVector& vector, int64_t c) {
  const int64_t i = c * vector.stride;
  switch (vector.type) {
    case FloatType::kFloat: return static_cast<const float*>(vector.data)[i];
    case FloatType::kDouble: return static_cast<const double*>(vector.data)[i];
    case FloatType::kHalf: return static_cast<float>(static_cast<const Half*>(vector.data)[i]);
    default: return static_cast<float>(static_cast<const BFloat16*>(vector.data)[i]);
  }
}

INLINE double load_or(const ChannelVector& vector, int64_t c, double absent) {
  return vector.data == nullptr ? absent : load(vector, c);
}

INLINE void store(const ChannelVector& vector, int64_t c, double value) {
  const int64_t i = c * vector.stride;
  switch (vector.type) {
    case FloatType::kFloat: static_cast<float*>(vector.data)[i] = static_cast<float>(value); break;
    case FloatType::kDouble: static_cast<double*>(vector.data)[i] = value; break;
    case FloatType::kHalf: static_cast<Half*>(vector.data)[i] = static_cast<float>(value); break;
    default: static_cast<BFloat16*>(vector.data)[i] = static_cast<float>(value);
  }
}

// First-touch page faults of a fresh large output cost more than its arithmetic; huge pages make them rare.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Hands out [0, tasks) to torch's threads one by one: with a random mask some tasks take longer than others.
template <typename F>
void for_each_task(int64_t tasks, int64_t elements, const F& f) {
  constexpr int64_t kSerialElements = 32768;
  const int64_t threads = elements < kSerialElements ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
  });
}

// ---- Lanes: 64 bytes of values in the accumulation dtype, whatever registers a clone has for them

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

template <typename T>
INLINE void store_lanes(T* to, const lanes_t<T>& lanes) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    __builtin_memcpy(to, &lanes, sizeof(lanes));
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
    __builtin_memcpy(to, &words, sizeof(words));
  }
}

template <typename T>
INLINE double total(const lanes_t<T>& lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += lanes[i];
  return sum;
}

// ---- Loops over memory, with one tensor (the forward pass: x) or two (the backward pass: x and dy). A run is a range
// of values of one channel; rows have columns, each with its own constants, and lie `stride` elements apart.

template <typename A>
struct Constants {  // y = (x - center) * slope + offset        dx = dy * scale + (x - center) * slope + offset
  A center, slope, offset, scale;
};

template <int kTensors, typename V>
INLINE void add_terms(const V& x, const V& dy, const V& center, V& sum, V& second) {
  const V difference = x - center;
  const V& first = kTensors == 1 ? difference : dy;
  sum += first;
  second += first * difference;
}

template <int kTensors, typename V>
INLINE V output(const V& x, const V& dy, const V& center, const V& slope, const V& offset, const V& scale) {
  const V affine = (x - center) * slope + offset;
  // dx on running statistics does not depend on x, which may be infinite
  return kTensors == 1 ? affine : dy * scale + (slope == 0 ? offset : affine);
}

constexpr int64_t kStreams = 4;

// sums += (sum of x - center, of its square), or (sum of dy, of dy * (x - center))
template <int kTensors, typename T>
SIMD_CLONES void sum_run(const T* x, const T* dy, int64_t n, acc_t<T> center, double* sums) {
  using V = lanes_t<T>;
  constexpr int64_t kStep = kLanes<T>;
  const V centers = V{} + center;
  V sum[kStreams] = {}, second[kStreams] = {};
  const int64_t quarter = n / kStreams / kStep * kStep;
  for (int64_t i = 0; i < quarter; i += kStep)
#pragma GCC unroll 4
    for (int stream = 0; stream < kStreams; ++stream) {
      const int64_t at = i + stream * quarter;
      add_terms<kTensors>(load_lanes(x + at), load_lanes((kTensors == 1 ? x : dy) + at), centers, sum[stream],
                          second[stream]);
    }
  int64_t i = kStreams * quarter;
  for (; i + kStep <= n; i += kStep)
    add_terms<kTensors>(load_lanes(x + i), load_lanes((kTensors == 1 ? x : dy) + i), centers, sum[0], second[0]);
  acc_t<T> rest = 0, second_rest = 0;
  for (; i < n; ++i)
    add_terms<kTensors>(static_cast<acc_t<T>>(x[i]), static_cast<acc_t<T>>((kTensors == 1 ? x : dy)[i]), center, rest,
                        second_rest);
  sums[0] += total<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
  sums[1] += total<T>((second[0] + second[1]) + (second[2] + second[3])) + second_rest;
}

template <int kTensors, typename T>
SIMD_CLONES void write_run(const T* x, const T* dy, T* out, int64_t n, const Constants<acc_t<T>>& constants) {
  using V = lanes_t<T>;
  const auto [center, slope, offset, scale] = constants;
  const V centers = V{} + center, slopes = V{} + slope, offsets = V{} + offset, scales = V{} + scale;
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>)
    store_lanes(out + i, output<kTensors>(load_lanes(x + i), load_lanes((kTensors == 1 ? x : dy) + i), centers, slopes,
                                          offsets, scales));
  for (; i < n; ++i)
    out[i] = static_cast<T>(output<kTensors>(static_cast<acc_t<T>>(x[i]),
                                             static_cast<acc_t<T>>((kTensors == 1 ? x : dy)[i]), center, slope, offset,
                                             scale));
}

// Takes the rows four at a time, strip by strip of columns: strip(address, step, rows, column, width) with `width` lanes,
// then single columns. The four lie a quarter of all rows apart, so that memory sees four sequential streams.
template <typename T, typename Strip, typename Single>
INLINE void for_each_strip(int64_t rows, int64_t stride, int64_t columns, const Strip& strip, const Single& single) {
  constexpr int64_t kStep = kLanes<T>;
  const int64_t height = rows / kStreams;
  const auto walk = [&](int64_t begin, int64_t end, int64_t step, int64_t count) __attribute__((always_inline)) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t column = 0;
      for (; column + 2 * kStep <= columns; column += 2 * kStep)
        strip(row * stride + column, step, count, column, std::integral_constant<int, 2>{});
      for (; column + kStep <= columns; column += kStep)
        strip(row * stride + column, step, count, column, std::integral_constant<int, 1>{});
      for (; column < columns; ++column) single(row * stride + column, step, count, column);
    }
  };
  walk(0, height, height * stride, kStreams);
  walk(height * kStreams, rows, 0, 1);
}

template <int kTensors, typename T>
SIMD_CLONES void sum_rows(const T* x, const T* dy, int64_t rows, int64_t stride, int64_t columns,
                          const acc_t<T>* center, acc_t<T>* sum, acc_t<T>* second) {
  using A = acc_t<T>;
  using V = lanes_t<T>;
  for_each_strip<T>(
      rows, stride, columns,
      [&](int64_t first, int64_t step, int64_t count, int64_t column, auto width) __attribute__((always_inline)) {
        constexpr int kWidth = decltype(width)::value;
        V centers[kWidth], sums[kWidth] = {}, seconds[kWidth] = {};
#pragma GCC unroll 2
        for (int v = 0; v < kWidth; ++v) centers[v] = load_lanes(center + column + v * kLanes<T>);
#pragma GCC unroll 4
        for (int64_t row = 0; row < count; ++row)
#pragma GCC unroll 2
          for (int v = 0; v < kWidth; ++v) {
            const int64_t at = first + row * step + v * kLanes<T>;
            add_terms<kTensors>(load_lanes(x + at), load_lanes((kTensors == 1 ? x : dy) + at), centers[v], sums[v],
                                seconds[v]);
          }
#pragma GCC unroll 2
        for (int v = 0; v < kWidth; ++v) {
          A *to = sum + column + v * kLanes<T>, *to_second = second + column + v * kLanes<T>;
          store_lanes(to, load_lanes(to) + sums[v]);
          store_lanes(to_second, load_lanes(to_second) + seconds[v]);
        }
      },
      [&](int64_t first, int64_t step, int64_t count, int64_t column) __attribute__((always_inline)) {
        for (int64_t row = 0; row < count; ++row) {
          const int64_t at = first + row * step;
          add_terms<kTensors>(static_cast<A>(x[at]), static_cast<A>((kTensors == 1 ? x : dy)[at]), center[column],
                              sum[column], second[column]);
        }
      });
}

template <int kTensors, typename T>
SIMD_CLONES void write_rows(const T* x, const T* dy, T* out, int64_t rows, int64_t stride, int64_t columns,
                            const acc_t<T>* center, const acc_t<T>* slope, const acc_t<T>* offset,
                            const acc_t<T>* scale) {
  using A = acc_t<T>;
  using V = lanes_t<T>;
  for_each_strip<T>(
      rows, stride, columns,
      [&](int64_t first, int64_t step, int64_t count, int64_t column, auto width) __attribute__((always_inline)) {
        constexpr int kWidth = decltype(width)::value;
        V centers[kWidth], slopes[kWidth], offsets[kWidth], scales[kWidth];
#pragma GCC unroll 2
        for (int v = 0; v < kWidth; ++v) {
          const int64_t at = column + v * kLanes<T>;
          centers[v] = load_lanes(center + at), slopes[v] = load_lanes(slope + at);
          offsets[v] = load_lanes(offset + at), scales[v] = load_lanes(scale + at);
        }
#pragma GCC unroll 4
        for (int64_t row = 0; row < count; ++row)
#pragma GCC unroll 2
          for (int v = 0; v < kWidth; ++v) {
            const int64_t at = first + row * step + v * kLanes<T>;
            store_lanes(out + at, output<kTensors>(load_lanes(x + at), load_lanes((kTensors == 1 ? x : dy) + at),
                                                   centers[v], slopes[v], offsets[v], scales[v]));
          }
      },
      [&](int64_t first, int64_t step, int64_t count, int64_t column) __attribute__((always_inline)) {
        for (int64_t row = 0; row < count; ++row) {
          const int64_t at = first + row * step;
          out[at] = static_cast<T>(output<kTensors>(static_cast<A>(x[at]), static_cast<A>((kTensors == 1 ? x : dy)[at]),
                                                    center[column], slope[column], offset[column], scale[column]));
        }
      });
}

// Adds the sums of each channel's columns to its two totals.
template <typename T>
SIMD_CLONES void add_columns(const acc_t<T>* sum, const acc_t<T>* second, int64_t channels, int64_t inner,
                             double* totals) {
  for (int64_t c = 0; c < channels; ++c, sum += inner, second += inner) {
    lanes_t<T> lanes = {}, second_lanes = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= inner; i += kLanes<T>)
      lanes += load_lanes(sum + i), second_lanes += load_lanes(second + i);
    totals[2 * c] += total<T>(lanes), totals[2 * c + 1] += total<T>(second_lanes);
    for (; i < inner; ++i) totals[2 * c] += sum[i], totals[2 * c + 1] += second[i];
  }
}

// ---- The operation. Both directions take two sums per channel, derive constants from them and write with these.

template <typename T>
struct Forward {
  using Element = T;
  using A = acc_t<T>;
  static constexpr int kTensors = 1;
  const ForwardCall& call;
  const T* x = static_cast<const T*>(call.input.const_data_ptr());
  const T* dy = x;  // there is none; only the address is used
  T* out = static_cast<T*>(call.output.mutable_data_ptr());
  A* mean = static_cast<A*>(call.mean.mutable_data_ptr());
  A* invstd = static_cast<A*>(call.invstd.mutable_data_ptr());
  const bool* mask = static_cast<const bool*>(call.mask.const_data_ptr());

  // Near the mean, so that no large squares are summed: the average of a few values.
  A center(int64_t c) const {
    const auto [outer, channels, inner] = call.view;
    const int64_t samples = std::min<int64_t>(outer, 16);
    double sum = 0;
    for (int64_t i = 0; i < samples; ++i)
      sum += static_cast<A>(x[(i * outer / samples * channels + c) * inner + i * inner / samples]);
    return std::isfinite(sum) ? static_cast<A>(sum / samples) : A(0);
  }

  Constants<A> constants(double mean, double invstd, int64_t c) const {
    return {static_cast<A>(mean), static_cast<A>(invstd * load_or(call.weight, c, 1)),
            static_cast<A>(load_or(call.bias, c, 0)), A(0)};
  }

  // Where they do not depend on the sums, a run is written while it is read for them.
  bool known(int64_t c) const { return !mask[c]; }
  void write_known(int64_t c, int64_t at, int64_t n) const {
    const double invstd = 1 / std::sqrt(load(call.running_var, c) + call.eps);
    write_run<1>(x + at, x + at, out + at, n, constants(load(call.running_mean, c), invstd, c));
  }

  Constants<A> finish(int64_t c, const double* sums, A center) const {
    const int64_t n = call.view.per_channel();
    const double old_mean = load(call.running_mean, c), old_var = load(call.running_var, c);
    const double shifted = sums[0] / n, batch_mean = center + shifted;
    const double difference = sums[1] - shifted * sums[0], squares = difference < 0 ? 0 : difference;
    const double used_mean = mask[c] ? batch_mean : old_mean;
    const double used_invstd = 1 / std::sqrt((mask[c] ? squares / n : old_var) + call.eps);
    mean[c] = static_cast<A>(used_mean), invstd[c] = static_cast<A>(used_invstd);
    const double unbiased = squares / std::max<int64_t>(n - 1, 1);
    store(call.running_mean, c, old_mean + call.momentum * (batch_mean - old_mean));
    store(call.running_var, c, old_var + call.momentum * (unbiased - old_var));
    return constants(used_mean, used_invstd, c);
  }
};

template <typename T>
struct Backward {
  using Element = T;
  using A = acc_t<T>;
  static constexpr int kTensors = 2;
  const BackwardCall& call;
  const T* x = static_cast<const T*>(call.input.const_data_ptr());
  const T* dy = static_cast<const T*>(call.grad_output.const_data_ptr());
  T* out = static_cast<T*>(call.grad_input.mutable_data_ptr());
  const A* mean = static_cast<const A*>(call.mean.const_data_ptr());
  const A* invstd = static_cast<const A*>(call.invstd.const_data_ptr());
  A* dweight = static_cast<A*>(call.grad_weight.mutable_data_ptr());
  A* dbias = static_cast<A*>(call.grad_bias.mutable_data_ptr());
  const bool* mask = static_cast<const bool*>(call.mask.const_data_ptr());

  A center(int64_t c) const { return mean[c]; }
  double scale(int64_t c) const { return static_cast<double>(invstd[c]) * load_or(call.weight, c, 1); }

  bool known(int64_t c) const { return !mask[c]; }
  void write_known(int64_t c, int64_t at, int64_t n) const {  // dx = dy * scale needs no x
    write_run<1>(dy + at, dy + at, out + at, n, Constants<A>{A(0), static_cast<A>(scale(c)), A(0), A(0)});
  }

  Constants<A> finish(int64_t c, const double* sums, A) const {
    const double dgamma = sums[1] * invstd[c];
    dbias[c] = static_cast<A>(sums[0]), dweight[c] = static_cast<A>(dgamma);
    const double share = mask[c] ? scale(c) / call.view.per_channel() : 0;
    // a select: statistics that are not used may be infinite
    const double slope = mask[c] ? -share * dgamma * invstd[c] : 0, offset = mask[c] ? -share * sums[0] : 0;
    return {mean[c], static_cast<A>(slope), static_cast<A>(offset), static_cast<A>(scale(c))};
  }
};

constexpr int64_t kCacheBytes = 512 << 10;  // what a thread may expect to find again in its own cache
constexpr int64_t kRunElements = 4096;      // summed in the accumulation dtype before the sum goes into a double
constexpr int64_t kRows = 256;              // likewise

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Long runs: a thread takes a channel, or a slice of its values where there are fewer channels than threads.
template <typename Op>
void over_runs(const Op& op) {
  using A = typename Op::A;
  const int64_t channels = op.call.view.channels, inner = op.call.view.inner, n = op.call.view.per_channel();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t slices = channels >= threads ? 1 : std::min(ceil_div(4 * threads, channels), ceil_div(n, 65536));
  const int64_t slice_length = ceil_div(n, slices);
  std::vector<double> sums(2 * channels * slices);
  std::vector<Constants<A>> constants(channels);
  const auto address = [&](int64_t c, int64_t i) { return (i / inner * channels + c) * inner + i % inner; };

  const auto sum = [&](int64_t c, int64_t slice) {
    const A center = op.center(c);
    double slice_sums[2] = {0, 0};
    const int64_t end = std::min(n, (slice + 1) * slice_length);
    for (int64_t i = slice * slice_length; i < end;) {
      const int64_t length = std::min({inner - i % inner, kRunElements, end - i}), at = address(c, i);
      sum_run<Op::kTensors>(op.x + at, op.dy + at, length, center, slice_sums);
      if (op.known(c)) op.write_known(c, at, length);
      i += length;
    }
    std::copy_n(slice_sums, 2, &sums[2 * (c * slices + slice)]);
  };
  const auto finish = [&](int64_t c) {
    double channel_sums[2] = {0, 0};
    for (int64_t i = 0; i < 2 * slices; ++i) channel_sums[i % 2] += sums[2 * c * slices + i];
    constants[c] = op.finish(c, channel_sums, op.center(c));
  };
  const auto write = [&](int64_t c, int64_t slice) {  // backwards: what was read last is still in the cache
    if (op.known(c)) return;
    const int64_t begin = slice * slice_length;
    for (int64_t i = std::min(n, begin + slice_length); i > begin;) {
      const int64_t length = std::min((i - 1) % inner + 1, i - begin);
      i -= length;
      const int64_t at = address(c, i);
      write_run<Op::kTensors>(op.x + at, op.dy + at, op.out + at, length, constants[c]);
    }
  };

  if (slices == 1) {
    for_each_task(channels, channels * n, [&](int64_t c) { sum(c, 0), finish(c), write(c, 0); });
  } else {
    for_each_task(channels * slices, channels * n, [&](int64_t task) { sum(task / slices, task % slices); });
    for (int64_t c = 0; c < channels; ++c) finish(c);
    for_each_task(channels * slices, channels * n, [&](int64_t task) { write(task / slices, task % slices); });
  }
}

// The channels [first, last) of a tensor whose runs are short, as rows: `inner` columns a channel.
template <typename Op>
class Rows {
  using A = typename Op::A;

 public:
  Rows(const Op& op, int64_t first, int64_t last)
      : op_(op), first_(first), last_(last), columns_((last - first) * op.call.view.inner), constants_(4 * columns_) {
    for (int64_t c = first; c < last; ++c) spread(0, c, op.center(c));
  }

  // Adds the sums over the rows [begin, end) to `totals`, two per channel.
  void sum(int64_t begin, int64_t end, double* totals) const {
    std::vector<A> sums(2 * columns_);
    for (int64_t row = begin; row < end; row += kRows) {
      std::fill(sums.begin(), sums.end(), A(0));
      sum_rows<Op::kTensors>(op_.x + address(row), op_.dy + address(row), std::min(kRows, end - row), stride(), columns_,
                             column(0), sums.data(), sums.data() + columns_);
      add_columns<typename Op::Element>(sums.data(), sums.data() + columns_, last_ - first_, op_.call.view.inner, totals);
    }
  }

  void finish(const double* totals) {
    for (int64_t c = first_; c < last_; ++c) {
      const A center = constants_[(c - first_) * op_.call.view.inner];
      const Constants<A> constants = op_.finish(c, totals + 2 * (c - first_), center);
      spread(0, c, constants.center), spread(1, c, constants.slope);
      spread(2, c, constants.offset), spread(3, c, constants.scale);
    }
  }

  void write(int64_t begin, int64_t end) const {
    const int64_t at = address(begin);
    write_rows<Op::kTensors>(op_.x + at, op_.dy + at, op_.out + at, end - begin, stride(), columns_, column(0),
                             column(1), column(2), column(3));
  }

 private:
  int64_t stride() const { return op_.call.view.channels * op_.call.view.inner; }
  int64_t address(int64_t row) const { return row * stride() + first_ * op_.call.view.inner; }
  const A* column(int constant) const { return constants_.data() + constant * columns_; }
  void spread(int constant, int64_t c, A value) {
    const int64_t inner = op_.call.view.inner;
    std::fill_n(constants_.begin() + constant * columns_ + (c - first_) * inner, inner, value);
  }

  const Op& op_;
  int64_t first_, last_, columns_;
  std::vector<A> constants_;  // [center, slope, offset, scale] x columns
};

// Short runs, channels_last among them: a thread takes a range of channels if its values stay in the cache between
// the passes, else a slice of the rows of all channels.
template <typename Op>
void over_rows(const Op& op) {
  const auto& view = op.call.view;
  const int64_t rows = view.outer, channels = view.channels, elements = rows * channels * view.inner;
  const int64_t threads = torch::stable::get_num_threads();
  constexpr int64_t kNarrowest = 256;  // columns: shorter pieces of a row waste what memory delivers around them
  const int64_t narrowest = std::min(channels, ceil_div(kNarrowest, view.inner));
  const int64_t cached = kCacheBytes / (Op::kTensors * rows * view.inner * static_cast<int64_t>(sizeof(typename Op::Element)));
  if (cached >= narrowest) {
    const int64_t width = std::clamp(ceil_div(channels, 4 * threads), narrowest, cached);
    for_each_task(ceil_div(channels, width), elements, [&](int64_t task) {
      Rows<Op> block(op, task * width, std::min(channels, (task + 1) * width));
      std::vector<double> totals(2 * width);
      block.sum(0, rows, totals.data());
      block.finish(totals.data());
      block.write(0, rows);
    });
    return;
  }
  const int64_t slices = std::clamp<int64_t>(elements / 65536, 1, 4 * threads), height = ceil_div(rows, slices);
  std::vector<double> totals(2 * channels * slices);
  Rows<Op> all(op, 0, channels);
  for_each_task(slices, elements, [&](int64_t slice) {
    all.sum(slice * height, std::min(rows, (slice + 1) * height), &totals[2 * channels * slice]);
  });
  for (int64_t i = 2 * channels; i < 2 * channels * slices; ++i) totals[i % (2 * channels)] += totals[i];
  all.finish(totals.data());
  for_each_task(slices, elements, [&](int64_t task) {  // backwards, as above
    const int64_t slice = slices - 1 - task;
    all.write(slice * height, std::min(rows, (slice + 1) * height));
  });
}

template <typename Op>
void run(const Op& op) {
  constexpr int64_t kLongRun = 512;
  const ChannelView& view = op.call.view;
  advise_huge_pages(op.out, view.per_channel() * view.channels * sizeof(typename Op::Element));
  if (view.inner >= kLongRun) over_runs(op);
  else over_rows(op);
}

template <typename F>
void dispatch(const Tensor& tensor, const F& f) {
  switch (float_type(tensor)) {
    case FloatType::kFloat: return f(float{});
    case FloatType::kDouble: return f(double{});
    case FloatType::kHalf: return f(Half{});
    case FloatType::kBFloat16: return f(BFloat16{});
  }
}

std::tuple<Tensor, Tensor, Tensor> stoch_norm_forward(const Tensor& input, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, const Tensor& running_mean,
                                                      const Tensor& running_var, const Tensor& mask, double momentum,
                                                      double eps) {
  const ForwardCall call = forward_call(input, weight, bias, running_mean, running_var, mask, momentum, eps);
  dispatch(input, [&](auto zero) {
    const Forward<decltype(zero)> op{call};
    if (input.numel() != 0) return run(op);
    for (int64_t c = 0; c < call.view.channels; ++c) {
      op.mean[c] = load(call.running_mean, c);
      op.invstd[c] = 1 / std::sqrt(load(call.running_var, c) + eps);
    }
  });
  return {call.output, call.mean, call.invstd};
}

std::tuple<Tensor, Tensor, Tensor> stoch_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& mean, const Tensor& invstd,
                                                       const std::optional<Tensor>& weight, const Tensor& mask) {
  const BackwardCall call = backward_call(grad_output, input, mean, invstd, weight, mask);
  dispatch(input, [&](auto zero) {
    const Backward<decltype(zero)> op{call};
    if (input.numel() != 0) return run(op);
    std::fill_n(op.dweight, call.view.channels, 0);
    std::fill_n(op.dbias, call.view.channels, 0);
  });
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CPU, m) {
  m.impl("stoch_norm_forward", TORCH_BOX(&talib_fast::stoch_norm_forward));
  m.impl("stoch_norm_backward", TORCH_BOX(&talib_fast::stoch_norm_backward));
}
