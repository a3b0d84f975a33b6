#include "../stoch_norm.h"

#include <cmath>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "simd.h"
#include "tasks.h"

namespace talib_fast {
namespace {

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

// Adds the sums of x - center and of its square, or those of dy and of dy * (x - center).
template <int kTensors, typename T>
SIMD_CLONES void sum_run(const T* x, const T* dy, int64_t n, acc_t<T> center, double& first_total,
                         double& second_total) {
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
  first_total += total<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
  second_total += total<T>((second[0] + second[1]) + (second[2] + second[3])) + second_rest;
}

template <int kTensors, typename T>
SIMD_CLONES void write_run(const T* x, const T* dy, T* out, int64_t n, const Constants<acc_t<T>>& constants,
                           bool stream) {
  using V = lanes_t<T>;
  const auto [center, slope, offset, scale] = constants;
  const V centers = V{} + center, slopes = V{} + slope, offsets = V{} + offset, scales = V{} + scale;
  const T* second = kTensors == 1 ? x : dy;
  const auto single = [&](int64_t i) __attribute__((always_inline)) {
    out[i] = static_cast<T>(output<kTensors>(static_cast<acc_t<T>>(x[i]), static_cast<acc_t<T>>(second[i]), center,
                                             slope, offset, scale));
  };
  const auto lanes = [&](int64_t i) __attribute__((always_inline)) {
    return output<kTensors>(load_lanes(x + i), load_lanes(second + i), centers, slopes, offsets, scales);
  };
  int64_t i = 0;
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64 != 0; ++i) single(i);
    for (; i + kLanes<T> <= n; i += kLanes<T>) store_lanes<true>(out + i, lanes(i));
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) store_lanes(out + i, lanes(i));
  for (; i < n; ++i) single(i);
}

// Takes the rows four at a time, strip by strip of columns: strip(address, step, rows, column, width) with `width`
// lanes, then single columns. The four lie a quarter of all rows apart, so that memory sees four sequential streams.
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
                            const acc_t<T>* scale, bool stream) {
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
            const V lanes = output<kTensors>(load_lanes(x + at), load_lanes((kTensors == 1 ? x : dy) + at), centers[v],
                                             slopes[v], offsets[v], scales[v]);
            if (stream) store_lanes<true>(out + at, lanes);
            else store_lanes(out + at, lanes);
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

// Adds the sums of each channel's columns, in as many rows as are given, to its totals.
template <typename T>
SIMD_CLONES void add_columns(const acc_t<T>* sums, int64_t rows, int64_t channels, int64_t inner, double* totals) {
  for (int64_t row = 0; row < rows; ++row) {
    if (inner == 1) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) totals[c] += sums[c];
      sums += channels;
      continue;
    }
    for (int64_t c = 0; c < channels; ++c, sums += inner) {
      lanes_t<T> lanes = {};
      int64_t i = 0;
      for (; i + kLanes<T> <= inner; i += kLanes<T>) lanes += load_lanes(sums + i);
      double rest = 0;
      for (; i < inner; ++i) rest += sums[i];
      totals[c] += total<T>(lanes) + rest;
    }
  }
}

// Adds to each sum the next of the values that lie `stride` elements apart.
template <typename T>
SIMD_CLONES void add_strided(const T* from, int64_t stride, int64_t n, double* sums) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<acc_t<T>>(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<acc_t<T>>(from[i * stride]);
}

// ---- The operation. Both directions take two sums per channel, derive constants from them and write with these.

// All the way to the batch's where the momentum is 1, whatever the old one is.
double moved(double running, double batch, double momentum) {
  return momentum == 1 ? batch : running + momentum * (batch - running);
}

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
  const ChannelMask mask = call.mask.channels;

  // Near the mean, so that no large squares are summed: the average of a few values.
  void centers(int64_t first, int64_t last, A* to) const {
    const auto [outer, channels, inner] = call.view;
    const int64_t n = outer * inner, samples = std::min<int64_t>(n, 16);
    std::vector<double> sums(last - first);
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t at = i * n / samples;
      add_strided(x + (at / inner * channels + first) * inner + at % inner, inner, last - first, sums.data());
    }
    for (int64_t c = 0; c < last - first; ++c)
      to[c] = std::isfinite(sums[c]) ? static_cast<A>(sums[c] / samples) : A(0);
  }

  Constants<A> constants(double mean, double invstd, int64_t c) const {
    return {static_cast<A>(mean), static_cast<A>(invstd * load_or(call.weight, c, 1)),
            static_cast<A>(load_or(call.bias, c, 0)), A(0)};
  }

  // Where they do not depend on the sums, a run is written from `source` while it is read for them.
  bool known(int64_t c) const { return !mask(c); }
  const T* source() const { return x; }
  Constants<A> known_constants(int64_t c) const {
    return constants(load(call.running.mean, c), 1 / std::sqrt(load(call.running.var, c) + call.eps), c);
  }

  Constants<A> finish(int64_t c, double sum, double second, A center) const {
    const int64_t n = call.view.per_channel();
    const double old_mean = load(call.running.mean, c), old_var = load(call.running.var, c);
    const double shifted = sum / n, batch_mean = center + shifted;
    const double difference = second - shifted * sum, squares = difference < 0 ? 0 : difference;
    const double used_mean = mask(c) ? batch_mean : old_mean;
    const double used_invstd = 1 / std::sqrt((mask(c) ? squares / n : old_var) + call.eps);
    mean[c] = static_cast<A>(used_mean), invstd[c] = static_cast<A>(used_invstd);
    const double unbiased = squares / std::max<int64_t>(n - 1, 1);
    store(call.moved.mean, c, moved(old_mean, batch_mean, call.momentum));
    store(call.moved.var, c, moved(old_var, unbiased, call.momentum));
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
  const ChannelMask mask = call.mask.channels;

  void centers(int64_t first, int64_t last, A* to) const { std::copy(mean + first, mean + last, to); }
  double scale(int64_t c) const { return static_cast<double>(invstd[c]) * load_or(call.weight, c, 1); }

  bool known(int64_t c) const { return !mask(c); }
  const T* source() const { return dy; }
  Constants<A> known_constants(int64_t c) const { return {A(0), static_cast<A>(scale(c)), A(0), A(0)}; }

  Constants<A> finish(int64_t c, double sum, double second, A) const {
    const double dgamma = second * invstd[c];
    dbias[c] = static_cast<A>(sum), dweight[c] = static_cast<A>(dgamma);
    const double share = mask(c) ? scale(c) / call.view.per_channel() : 0;
    // a select: statistics that are not used may be infinite
    const double slope = mask(c) ? -share * dgamma * invstd[c] : 0, offset = mask(c) ? -share * sum : 0;
    return {mean[c], static_cast<A>(slope), static_cast<A>(offset), static_cast<A>(scale(c))};
  }
};

// ---- Two ways to walk a range of channels. Both see rows, add sums over rows to `totals` (all channels' first sums,
// then their second ones), derive the constants and write rows; no row depends on another.

// Long runs: a row is one piece of the run of every channel, in one image.
template <typename Op>
class Runs {
  using A = typename Op::A;
  using T = typename Op::Element;

 public:
  static int64_t rows(const ChannelView& view) { return view.outer * pieces(view); }
  static int64_t together(const ChannelView&) { return 1; }  // rows that are better not torn apart
  // blocks of channels: one is always worth it, even where it does not fit
  static int64_t narrowest(const ChannelView&) { return 1; }
  static int64_t widest(int64_t fitting) { return std::max<int64_t>(fitting, 1); }

  Runs(const Op& op, int64_t first, int64_t last, bool stream)
      : op_(op), first_(first), last_(last), stream_(stream), centers_(last - first), constants_(last - first) {
    op.centers(first, last, centers_.data());
    for (int64_t c = first; c < last; ++c)
      if (op.known(c)) constants_[c - first] = op.known_constants(c);
  }

  void sum(int64_t begin, int64_t end, double* totals) const {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = first_; c < last_; ++c) {
        const auto [at, n] = piece(row, c);
        sum_run<Op::kTensors>(op_.x + at, op_.dy + at, n, centers_[c - first_], totals[c - first_],
                              totals[last_ - first_ + c - first_]);
        const T* source = op_.source() + at;
        if (op_.known(c)) write_run<1>(source, source, op_.out + at, n, constants_[c - first_], stream_);
      }
  }

  void finish(int64_t begin, int64_t end, const double* totals) {
    for (int64_t c = begin; c < end; ++c)
      constants_[c - first_] =
          op_.finish(c, totals[c - first_], totals[last_ - first_ + c - first_], centers_[c - first_]);
  }

  void write(int64_t begin, int64_t end) const {
    for (int64_t row = end; row-- > begin;)  // what was read last is still in the cache
      for (int64_t c = last_; c-- > first_;) {
        if (op_.known(c)) continue;
        const auto [at, n] = piece(row, c);
        write_run<Op::kTensors>(op_.x + at, op_.dy + at, op_.out + at, n, constants_[c - first_], stream_);
      }
  }

 private:
  static constexpr int64_t kPiece = 4096;  // summed in the accumulation dtype before the sum goes into a double
  static int64_t pieces(const ChannelView& view) { return ceil_div(view.inner, kPiece); }

  std::pair<int64_t, int64_t> piece(int64_t row, int64_t c) const {
    const auto [outer, channels, inner] = op_.call.view;
    const int64_t count = pieces(op_.call.view), begin = row % count * kPiece;
    return {(row / count * channels + c) * inner + begin, std::min(kPiece, inner - begin)};
  }

  const Op& op_;
  int64_t first_, last_;
  bool stream_;
  std::vector<A> centers_;
  std::vector<Constants<A>> constants_;
};

// Short runs, channels_last among them: a row has `inner` columns a channel. Where rows are narrow and would not fill
// their vectors, several are taken as one, with as many copies of each channel.
template <typename Op>
class Rows {
  using A = typename Op::A;
  using T = typename Op::Element;

 public:
  static int64_t rows(const ChannelView& view) { return view.outer; }
  static int64_t together(const ChannelView& view) {
    constexpr int64_t kWidest = 4096;
    const int64_t row = view.channels * view.inner;
    int64_t count = kLanes<T> / std::gcd(row, kLanes<T>);
    if (count * row < 2 * kLanes<T>) count *= 2;
    return count * row <= kWidest && 4 * count <= view.outer ? count : 1;  // or it would not be worth the copies
  }
  // shorter pieces of a row waste what memory delivers around them
  static int64_t narrowest(const ChannelView& view) { return std::min(view.channels, ceil_div(256, view.inner)); }
  static int64_t widest(int64_t fitting) { return fitting; }

  Rows(const Op& op, int64_t first, int64_t last, bool stream)
      : op_(op),
        first_(first),
        last_(last),
        stream_(stream),
        together_(last - first == op.call.view.channels ? together(op.call.view) : 1),
        row_((last - first) * op.call.view.inner),
        columns_(together_ * row_),
        constants_(4 * columns_) {
    std::vector<A> centers(last - first);
    op.centers(first, last, centers.data());
    for (int64_t c = first; c < last; ++c) spread(0, c, centers[c - first]);
    repeat(0, first, last);
  }

  void sum(int64_t begin, int64_t end, double* totals) const {
    const int64_t most = 256 * together_;  // summed in the accumulation dtype before the sums go into doubles
    std::vector<A> sums(2 * columns_);
    for (int64_t row = begin; row < end; row += most) {
      std::fill(sums.begin(), sums.end(), A(0));
      for_each_height(row, std::min(end, row + most), [&](int64_t at, int64_t rows, int64_t count) {
        sum_rows<Op::kTensors>(op_.x + at, op_.dy + at, rows, count * stride(), count * row_, column(0), sums.data(),
                               sums.data() + columns_);
      });
      for (int which = 0; which < 2; ++which)
        add_columns<T>(sums.data() + which * columns_, together_, last_ - first_, op_.call.view.inner,
                       totals + which * (last_ - first_));
    }
  }

  void finish(int64_t begin, int64_t end, const double* totals) {
    for (int64_t c = begin; c < end; ++c) {
      const A center = constants_[(c - first_) * op_.call.view.inner];
      const Constants<A> constants = op_.finish(c, totals[c - first_], totals[last_ - first_ + c - first_], center);
      spread(0, c, constants.center), spread(1, c, constants.slope);
      spread(2, c, constants.offset), spread(3, c, constants.scale);
    }
    for (int constant = 0; constant < 4; ++constant) repeat(constant, begin, end);
  }

  void write(int64_t begin, int64_t end) const {
    for_each_height(begin, end, [&](int64_t at, int64_t rows, int64_t count) {
      const int64_t step = count * stride();
      const bool aligned = reinterpret_cast<uint64_t>(op_.out + at) % 64 == 0 && step * sizeof(T) % 64 == 0;
      write_rows<Op::kTensors>(op_.x + at, op_.dy + at, op_.out + at, rows, step, count * row_, column(0), column(1),
                               column(2), column(3), stream_ && aligned);
    });
  }

 private:
  int64_t stride() const { return op_.call.view.channels * op_.call.view.inner; }
  int64_t address(int64_t row) const { return row * stride() + first_ * op_.call.view.inner; }
  const A* column(int constant) const { return constants_.data() + constant * columns_; }
  void spread(int constant, int64_t c, A value) {
    const int64_t inner = op_.call.view.inner;
    std::fill_n(constants_.begin() + constant * columns_ + (c - first_) * inner, inner, value);
  }
  // for the copies of channels [begin, end)
  void repeat(int constant, int64_t begin, int64_t end) {
    const int64_t inner = op_.call.view.inner;
    const auto from = constants_.begin() + constant * columns_ + (begin - first_) * inner;
    for (int64_t copy = 1; copy < together_; ++copy) std::copy_n(from, (end - begin) * inner, from + copy * row_);
  }
  // f(address, rows, how many are one) for those that go together and for the rest
  template <typename F>
  void for_each_height(int64_t begin, int64_t end, const F& f) const {
    const int64_t rows = (end - begin) / together_, rest = (end - begin) % together_;
    if (rows > 0) f(address(begin), rows, together_);
    if (rest > 0) f(address(end - rest), rest, 1);
  }

  const Op& op_;
  int64_t first_, last_;
  bool stream_;
  int64_t together_, row_, columns_;
  std::vector<A> constants_;  // [center, slope, offset, scale] x columns
};

// A thread takes some channels through both passes where their values stay in its own cache between the two. Where no
// such block is wide enough, or there are too few, all threads share the rows of all channels.
template <template <typename> class Layout, typename Op>
void walk(const Op& op) {
  constexpr int64_t kSize = sizeof(typename Op::Element), kTasks = 4;
  const ChannelView& view = op.call.view;
  const int64_t rows = Layout<Op>::rows(view), channels = view.channels, elements = view.per_channel() * channels;
  const int64_t threads = torch::stable::get_num_threads();
  const bool stream = (Op::kTensors + 1) * elements * kSize > kSharedCache;

  const int64_t narrowest = Layout<Op>::narrowest(view);
  const int64_t widest = Layout<Op>::widest(kOwnCache / (Op::kTensors * view.per_channel() * kSize));
  // A block that the core's cache does not hold has to be worth it: with few for each thread, the last ones leave many
  // threads idle.
  const bool fits = Op::kTensors * view.per_channel() * kSize <= kOwnCache;
  const int64_t rounds = ceil_div(channels, threads);
  // Maps in channels_last that stay in the cores' caches are best taken by rows, as other operators' threads took them.
  const bool resident = view.inner == 1 && Op::kTensors * elements * kSize <= kOwnCache * threads;
  if (!resident && widest >= narrowest && channels >= threads && (fits || 5 * channels >= 4 * rounds * threads)) {
    int64_t width = std::clamp(ceil_div(channels, kTasks * threads), narrowest, widest);
    constexpr int64_t kLine = 64 / kSize;
    if (width > kLine) width -= width % kLine;  // whole cache lines
    for_each_task(ceil_div(channels, width), elements, [&](int64_t task) {
      const int64_t first = task * width, last = std::min(channels, first + width);
      Layout<Op> block(op, first, last, stream);
      std::vector<double> totals(2 * (last - first));
      block.sum(0, rows, totals.data());
      block.finish(first, last, totals.data());
      block.write(0, rows);
      settle(stream);
    });
    return;
  }

  const int64_t sharing = std::clamp<int64_t>(elements / 16384, 1, threads);
  const int64_t most = sharing * std::clamp<int64_t>(elements / (65536 * sharing), 1, kTasks);
  const int64_t together = Layout<Op>::together(view);
  const int64_t height = ceil_div(ceil_div(rows, most), together) * together, slices = ceil_div(rows, height);
  std::vector<double> totals(2 * channels * slices);
  Layout<Op> all(op, 0, channels, stream);
  for_each_task(slices, elements, [&](int64_t slice) {
    all.sum(slice * height, std::min(rows, (slice + 1) * height), &totals[2 * channels * slice]);
    settle(stream);
  });
  constexpr int64_t kChannels = 128, kCost = 64;  // finishing a channel takes as long as so many elements
  for_each_task(ceil_div(channels, kChannels), kCost * channels, [&](int64_t task) {
    const int64_t first = task * kChannels, last = std::min(channels, first + kChannels);
    for (int64_t slice = 1; slice < slices; ++slice)
      for (const int64_t begin : {first, channels + first})
        for (int64_t i = begin; i < begin + last - first; ++i) totals[i] += totals[2 * channels * slice + i];
    all.finish(first, last, totals.data());
  });
  const auto write = [&](int64_t slice) {
    all.write(slice * height, std::min(rows, (slice + 1) * height));
    settle(stream);
  };
  for_each_task(slices, elements, write, true);  // backwards: what was read last is still in the cache
}

template <typename Op>
void run(const Op& op) {
  constexpr int64_t kLongRun = 512;
  const ChannelView& view = op.call.view;
  advise_huge_pages(op.out, view.per_channel() * view.channels * sizeof(typename Op::Element));
  if (view.inner >= kLongRun) walk<Runs>(op);
  else walk<Rows>(op);
}

void forward(const ForwardCall& call) {
  if (call.batches != nullptr) ++*call.batches;
  dispatch(float_type(call.input), [&](auto zero) {
    const Forward<decltype(zero)> op{call};
    if (call.input.numel() != 0) return run(op);
    for (int64_t c = 0; c < call.view.channels; ++c) {
      const double mean = load(call.running.mean, c), var = load(call.running.var, c);
      op.mean[c] = mean, op.invstd[c] = 1 / std::sqrt(var + call.eps);
      store(call.moved.mean, c, mean), store(call.moved.var, c, var);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> stoch_norm_forward(const Tensor& input, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, const Tensor& running_mean,
                                                      const Tensor& running_var, const Tensor& mask, double momentum,
                                                      double eps, double p,
                                                      const std::optional<Tensor>& num_batches_tracked) {
  const RunningStatistics running{channel_vector(running_mean, input, "running_mean"),
                                  channel_vector(running_var, input, "running_var")};
  const ForwardCall call =
      forward_call(input, weight, bias, running, running, mask, momentum, eps, p, num_batches_tracked);
  forward(call);
  return {call.output, call.mean, call.invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stoch_norm_functional(const Tensor& input,
                                                                 const std::optional<Tensor>& weight,
                                                                 const std::optional<Tensor>& bias,
                                                                 const Tensor& running, const Tensor& mask, double eps,
                                                                 double p) {
  const FunctionalCall call = functional_call(input, weight, bias, running, mask, eps, p);
  forward(call.forward);
  return {call.forward.output, call.forward.mean, call.forward.invstd, call.batch};
}

std::tuple<Tensor, Tensor, Tensor> stoch_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       const Tensor& mean, const Tensor& invstd,
                                                       const std::optional<Tensor>& weight, const Tensor& mask,
                                                       double p) {
  const BackwardCall call = backward_call(grad_output, input, mean, invstd, weight, mask, p);
  dispatch(float_type(input), [&](auto zero) {
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
  m.impl("stoch_norm_functional", TORCH_BOX(&talib_fast::stoch_norm_functional));
  m.impl("stoch_norm_backward", TORCH_BOX(&talib_fast::stoch_norm_backward));
}
