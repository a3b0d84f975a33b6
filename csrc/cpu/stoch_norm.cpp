#include "../stoch_norm.h"

#include <cmath>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "elementary.h"
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

// ---- Activations. A piecewise one is a straight line on each side of 0, a smooth one is z * g(z) with a gate g that
// rises from 0 to 1. Conditions are made by `lanes`, see below.

struct Identity {
  template <typename Access, typename V>
  INLINE V operator()(const Access&, const V& z) const {
    return z;
  }
};

template <typename A>
struct Piecewise {
  A slope, limit;
  int leaks;  // -1, or 0 where the slope is: then even an infinite value gives 0

  explicit Piecewise(const Epilogue& epilogue)
      : slope(static_cast<A>(epilogue.slope)), limit(static_cast<A>(epilogue.limit)), leaks(slope == 0 ? 0 : -1) {}

  template <typename Access, typename V>
  INLINE V operator()(const Access& lanes, const V& z) const {
    const V above = lanes.min(V{} + limit, lanes.max(V{}, z));
    if (Access::kBranches && leaks == 0) return above;
    return lanes.select(lanes.less(z, V{}) & leaks, slope * z, above);
  }
  // where the derivative is 1 and not the slope
  template <typename Access, typename V>
  INLINE auto rises(const Access& lanes, const V& z) const {
    return lanes.less(V{}, z) & lanes.less(z, V{} + limit);
  }
  template <typename Access, typename Condition, typename V>
  INLINE V gradient(const Access& lanes, const Condition& rises, const V& dy) const {
    if (Access::kBranches && leaks == 0) return lanes.select(rises, dy, V{});
    return lanes.select(rises, dy, lanes.select(lanes.template all<V>() & leaks, slope * dy, V{}));
  }
};

template <Activation kActivation>
struct Smooth {
  // the gate, and z times its derivative
  template <typename Access, typename V>
  INLINE void gate(const Access& lanes, const V& z, V& g, V& rise) const {
    using A = std::remove_cvref_t<decltype(z[0])>;
    constexpr A kSixth = A(1) / 6, kDensity = 0.39894228040143267794;  // that of a normal variable at 0
    const V largest = V{} + kLargest<A>;
    if constexpr (kActivation == Activation::kHardswish) {
      const V inside = lanes.max(V{} - 3, lanes.min(V{} + 3, z));
      g = (inside + 3) * kSixth;  // 0 up to -3, to the last bit
      rise = lanes.select(lanes.less(inside * inside, V{} + 9), inside * kSixth, V{});
    } else if constexpr (kActivation == Activation::kSilu) {
      const V inside = lanes.max(-largest, lanes.min(largest, z)), power = exponential(-inside);
      const V sigmoid = lanes.reciprocal(1 + power);
      g = lanes.select(lanes.less(-largest, z), sigmoid, V{});
      rise = g * (inside * (power * sigmoid));
    } else {
      const V size = lanes.max(z, -z), exponent = size * size * A(-0.5);
      const V power = lanes.select(lanes.less(-largest, exponent), exponential(lanes.max(-largest, exponent)), V{});
      const V least = upper_tail(size, power);
      g = lanes.select(lanes.less(V{}, z), 1 - least, least);
      rise = lanes.min(largest, lanes.max(-largest, z)) * (power * kDensity);
    }
  }
  template <typename Access, typename V>
  INLINE V operator()(const Access& lanes, const V& z) const {
    V g, rise;
    gate(lanes, z, g, rise);
    return z * g;
  }
  // a select: where the activation is flat, an infinite gradient is 0
  template <typename Access, typename V>
  INLINE V gradient(const Access& lanes, const V& z, const V& dy) const {
    V g, rise;
    gate(lanes, z, g, rise);
    const V slope = g + rise;
    return lanes.select(lanes.not_zero(slope), dy * slope, V{});
  }
};

template <typename Act>
constexpr bool is_smooth = false;
template <Activation kActivation>
constexpr bool is_smooth<Smooth<kActivation>> = true;

// f(the activation, whether there is a residual)
template <typename A, typename F>
void with_activation(const Epilogue& epilogue, bool residual, const F& f) {
  if (residual) return f(Piecewise<A>(epilogue), std::true_type{});
  switch (epilogue.activation) {
    case Activation::kNone: return f(Identity{}, std::false_type{});
    case Activation::kSilu: return f(Smooth<Activation::kSilu>{}, std::false_type{});
    case Activation::kHardswish: return f(Smooth<Activation::kHardswish>{}, std::false_type{});
    case Activation::kGelu: return f(Smooth<Activation::kGelu>{}, std::false_type{});
    default: return f(Piecewise<A>(epilogue), std::false_type{});
  }
}

// ---- What is done with the elements from one on. They fill the lanes (`Whole`), or the first of them (`Part`).

template <typename T>
struct Tensors {
  const T *x, *other;  // the residual, or the output's gradient
  T *out, *grad_residual;
  bits_t<T>* signs;
};

template <typename T, bool kWide>
struct Whole : Registers<kWide> {
  bool stream;

  explicit Whole(bool stream) : stream(stream) {}
  INLINE lanes_t<T> load(const T* from) const { return load_lanes<kWide>(from); }
  template <int kCount>
  INLINE void store(T* to, const lanes_t<T> (&lanes)[kCount]) const {
    if (stream) store_lanes<true, kWide>(to, lanes);
    else store_lanes<false, kWide>(to, lanes);
  }
  INLINE lanes_t<T> counted(const lanes_t<T>& lanes) const { return lanes; }
  INLINE int64_t count() const { return kLanes<T>; }
};

template <typename T, bool kWide>
struct Part : Registers<kWide> {
  int64_t n;

  explicit Part(int64_t n) : n(n) {}
  INLINE lanes_t<T> load(const T* from) const { return load_first<kWide>(from, n); }
  INLINE void store(T* to, const lanes_t<T> (&lanes)[1]) const { store_first<kWide>(to, lanes[0], n); }
  INLINE lanes_t<T> counted(const lanes_t<T>& lanes) const {
    return this->select(this->template first<lanes_t<T>>(n), lanes, lanes_t<T>{});
  }
  INLINE int64_t count() const { return n; }
};

// y = act(z + residual) with z = (x - center) * scale + bias
// dx = dz * scale + (x - center) * slope + offset with dz = dy * act'(z)
template <typename V>
struct Constants {
  V center, scale, bias, slope, offset;
};

// the sums of x - center and of its square
template <typename T>
struct Moments {
  using Element = T;
  Tensors<T> tensors;

  template <typename Access, typename V>
  INLINE void terms(const Access& lanes, int64_t at, const Constants<V>& c, V& first, V& second) const {
    first = lanes.load(tensors.x + at) - c.center;
    second = first * first;
  }
};

template <typename T, typename Act, bool kResidual>
struct Output {
  using Element = T;
  Tensors<T> tensors;
  Act act;

  bool has_signs() const { return kResidual && tensors.signs != nullptr; }

  template <int kRows = 1, typename Access, typename V, int kVectors>
  INLINE void write(const Access& lanes, int64_t at, const Constants<V> (&constants)[kVectors],
                    int64_t distance = 0) const {
    V y[kRows][kVectors];
#pragma GCC unroll 8
    for (int k = 0; k < kRows * kVectors; ++k) {
      const int row = k / kVectors, v = k % kVectors;
      const Constants<V>& c = constants[v];
      const int64_t i = at + row * distance + v * kLanes<T>;
      V z = (lanes.load(tensors.x + i) - c.center) * c.scale + c.bias;
      if constexpr (kResidual) {
        z += lanes.load(tensors.other + i);
        if (tensors.signs != nullptr) write_bits(tensors.signs, i, lanes.count(), lanes.bits(act.rises(lanes, z)));
      }
      y[row][v] = act(lanes, z);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) lanes.store(tensors.out + at + row * distance, y[row]);
  }
};

// The sums of dz and of dz * (x - center), and dx; dz is the residual's gradient too. Signs, which then are there, say
// where the activation's derivative is 1. That of a smooth one takes longer to compute than to store and load: dz is
// left where dx will be.
template <typename T, typename Act, bool kSigns>
struct Gradient {
  using Element = T;
  Tensors<T> tensors;
  Act act;

  bool has_signs() const { return false; }  // to be written

  template <typename Access, typename V>
  INLINE V dz(const Access& lanes, int64_t at, const Constants<V>& c, const V& difference) const {
    const V dy = lanes.load(tensors.other + at), z = difference * c.scale + c.bias;
    if constexpr (std::is_same_v<Act, Identity>) {
      return dy;
    } else if constexpr (is_smooth<Act>) {
      return act.gradient(lanes, z, dy);
    } else if constexpr (kSigns) {
      const int bits = read_bits(tensors.signs, at, lanes.count());
      return act.gradient(lanes, lanes.template of_bits<V>(bits), dy);
    } else {
      return act.gradient(lanes, act.rises(lanes, z), dy);
    }
  }

  template <typename Access, typename V>
  INLINE void terms(const Access& lanes, int64_t at, const Constants<V>& c, V& first, V& second) const {
    const V difference = lanes.load(tensors.x + at) - c.center;
    first = dz(lanes, at, c, difference);
    second = first * difference;
    if constexpr (is_smooth<Act>) lanes.store(tensors.out + at, {first});
  }

  template <int kRows = 1, typename Access, typename V, int kVectors>
  INLINE void write(const Access& lanes, int64_t at, const Constants<V> (&constants)[kVectors],
                    int64_t distance = 0) const {
    V gradient[kRows][kVectors], dx[kRows][kVectors];
#pragma GCC unroll 8
    for (int k = 0; k < kRows * kVectors; ++k) {
      const int row = k / kVectors, v = k % kVectors;
      const Constants<V>& c = constants[v];
      const int64_t i = at + row * distance + v * kLanes<T>;
      const V difference = lanes.load(tensors.x + i) - c.center;
      gradient[row][v] = dz(lanes, i, c, difference);
      // dx on running statistics does not depend on x, which may be infinite
      const V affine = lanes.select(lanes.not_zero(c.slope), difference * c.slope + c.offset, c.offset);
      dx[row][v] = gradient[row][v] * c.scale + affine;
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      if constexpr (kSigns) lanes.store(tensors.grad_residual + at + row * distance, gradient[row]);
      lanes.store(tensors.out + at + row * distance, dx[row]);
    }
  }
};

// ---- Loops over memory. A run is a range of values of one channel; rows have columns, each with its own constants,
// and lie `stride` elements apart.

constexpr int64_t kStreams = 4;

template <typename V, typename A>
INLINE Constants<V> broadcast(const Constants<A>& c) {
  return {V{} + c.center, V{} + c.scale, V{} + c.bias, V{} + c.slope, V{} + c.offset};
}

struct SumRun {
  template <bool kWide, typename Step, typename A, typename T = typename Step::Element>
  static INLINE void run(const Step& step, int64_t at, int64_t n, const Constants<A>& of_channel, double* first_total,
                         double* second_total) {
    using V = lanes_t<T>;
    const Constants<V> constants = broadcast<V>(of_channel);
    V first[kStreams] = {}, second[kStreams] = {};
    const auto add = [&](const auto& lanes, int64_t i, int stream) __attribute__((always_inline)) {
      V term, product;
      step.terms(lanes, at + i, constants, term, product);
      first[stream] += lanes.counted(term), second[stream] += lanes.counted(product);
    };
    const Whole<T, kWide> whole(false);
    const int64_t quarter = n / kStreams / kLanes<T> * kLanes<T>;
    for (int64_t i = 0; i < quarter; i += kLanes<T>)
#pragma GCC unroll 4
      for (int stream = 0; stream < kStreams; ++stream) add(whole, i + stream * quarter, stream);
    int64_t i = kStreams * quarter;
    for (; i + kLanes<T> <= n; i += kLanes<T>) add(whole, i, 0);
    if (i < n) add(Part<T, kWide>(n - i), i, 0);
    *first_total += total<T>((first[0] + first[1]) + (first[2] + first[3]));
    *second_total += total<T>((second[0] + second[1]) + (second[2] + second[3]));
  }
};

struct WriteRun {
  template <bool kWide, typename Step, typename A, typename T = typename Step::Element>
  static INLINE void run(const Step& step, int64_t at, int64_t n, const Constants<A>& of_channel, bool stream) {
    using V = lanes_t<T>;
    constexpr int64_t kPair = 2 * kLanes<T>;
    const Constants<V> one[] = {broadcast<V>(of_channel)}, two[] = {one[0], one[0]};
    const int64_t end = at + n;
    while (at < end) {
      const int64_t begun = at % kPair;
      if (end - at >= kPair && (begun == 0 || !(stream || step.has_signs()))) {
        for (; at + kPair <= end; at += kPair) step.write(Whole<T, kWide>(stream), at, two);
      } else {  // up to where whole units of memory begin
        const int64_t part = std::min(end - at, kLanes<T> - begun % kLanes<T>);
        step.write(Part<T, kWide>(part), at, one);
        at += part;
      }
    }
  }
};

// Takes the rows four at a time, strip by strip of columns: strip(address, step, rows, column, width, lanes) with
// `width` vectors. The four lie a quarter of all rows apart, so that memory sees four sequential streams.
template <typename T, bool kWide, typename Strip>
INLINE void for_each_strip(int64_t at, int64_t rows, int64_t stride, int64_t columns, bool stream, const Strip& strip) {
  constexpr int64_t kStep = kLanes<T>;
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  const Whole<T, kWide> whole(stream);
  const int64_t height = rows / kStreams, rest = rows % kStreams, step = height * stride;
  for (int64_t i = 0; i < height + rest; ++i) {
    const int64_t count = i < height ? kStreams : 1, row = i < height ? i : i + (kStreams - 1) * height;
    int64_t first = at + row * stride, column = 0;
    for (; column + 2 * kStep <= columns; column += 2 * kStep) strip(first + column, step, count, column, kTwo, whole);
    for (; column + kStep <= columns; column += kStep) strip(first + column, step, count, column, kOne, whole);
    if (column < columns) strip(first + column, step, count, column, kOne, Part<T, kWide>(columns - column));
  }
}

// One vector of each array of constants, which lie `width` apart.
template <typename A, typename V = typename Lanes<A>::type>
INLINE Constants<V> constants_at(const A* from, int64_t width) {
  return {load_lanes(from), load_lanes(from + width), load_lanes(from + 2 * width), load_lanes(from + 3 * width),
          load_lanes(from + 4 * width)};
}

// Adds to the columns' first sums and, `width` further on, their second ones.
struct SumRows {
  template <bool kWide, typename Step, typename A, typename T = typename Step::Element>
  static INLINE void run(const Step& step, int64_t at, int64_t rows, int64_t stride, int64_t columns,
                         const A* constants, int64_t width, A* sums) {
    using V = lanes_t<T>;
    for_each_strip<T, kWide>(
        at, rows, stride, columns, false,
        [&](int64_t first, int64_t distance, int64_t count, int64_t column, auto vectors, const auto& lanes)
            __attribute__((always_inline)) {
          constexpr int kVectors = decltype(vectors)::value;
          Constants<V> c[kVectors];
          V sum[kVectors] = {}, second[kVectors] = {};
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) c[v] = constants_at(constants + column + v * kLanes<T>, width);
          for (int64_t row = 0; row < count; ++row) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
              V term, product;
              step.terms(lanes, first + row * distance + v * kLanes<T>, c[v], term, product);
              sum[v] += term, second[v] += product;
            }
          }
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            A* to = sums + column + v * kLanes<T>;
            store_lanes(to, load_lanes(to) + lanes.counted(sum[v]));
            store_lanes(to + width, load_lanes(to + width) + lanes.counted(second[v]));
          }
        });
  }
};

struct WriteRows {
  template <bool kWide, typename Step, typename A, typename T = typename Step::Element>
  static INLINE void run(const Step& step, int64_t at, int64_t rows, int64_t stride, int64_t columns,
                         const A* constants, int64_t width, bool stream) {
    for_each_strip<T, kWide>(
        at, rows, stride, columns, stream,
        [&](int64_t first, int64_t distance, int64_t count, int64_t column, auto vectors, const auto& lanes)
            __attribute__((always_inline)) {
          constexpr int kVectors = decltype(vectors)::value;
          Constants<lanes_t<T>> c[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) c[v] = constants_at(constants + column + v * kLanes<T>, width);
          if constexpr (kWide)  // other registers do not hold so many rows
            if (count == kStreams) return step.template write<kStreams>(lanes, first, c, distance);
          for (int64_t row = 0; row < count; ++row) step.write(lanes, first + row * distance, c);
        });
  }
};

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
  static constexpr int kKept = 1;         // tensors that both passes read
  static constexpr int kDone[] = {0, 3};  // what of the constants the sums give: from the center up to the slope
  const ForwardCall& call;
  const Tensors<T> tensors{static_cast<const T*>(call.input.const_data_ptr()),
                           call.residual ? static_cast<const T*>(call.residual->const_data_ptr()) : nullptr,
                           static_cast<T*>(call.output.mutable_data_ptr()), nullptr,
                           call.signs.numel() != 0 ? static_cast<bits_t<T>*>(call.signs.mutable_data_ptr()) : nullptr};
  const int moved = call.residual ? 3 : 2;  // tensors that a pass reads or writes
  A* mean = static_cast<A*>(call.statistics.mutable_data_ptr());
  A* invstd = mean + call.view.channels;
  const ChannelMask mask = call.mask.channels;

  // Where tasks may share units of bits, these are put together out of zeros.
  void clear_signs() const {
    const auto [outer, channels, inner] = call.view;
    const int64_t words = call.signs.numel(), columns = inner == 1 ? channels : inner;
    if (words == 0) return;
    int32_t* end = static_cast<int32_t*>(call.signs.mutable_data_ptr()) + words;
    std::fill(columns % kLanes<T> == 0 ? end - 1 : end - words, end, 0);
  }

  // f(what the first pass does), f(what the second one does)
  template <typename F>
  void summing(const F& f) const {
    f(Moments<T>{tensors});
  }
  template <typename F>
  void writing(const F& f) const {
    with_activation<A>(call.epilogue, call.residual.has_value(), [&](auto act, auto residual) {
      f(Output<T, decltype(act), residual.value>{tensors, act});
    });
  }

  // What the first pass needs, so many of the constants: a center near the mean, so that no large squares are summed.
  // It is the average of a few values.
  int begun() const { return 1; }
  std::vector<Constants<A>> begin(int64_t first, int64_t last) const {
    const auto [outer, channels, inner] = call.view;
    const int64_t n = outer * inner, samples = std::min<int64_t>(n, 16);
    std::vector<double> sums(last - first);
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t at = i * n / samples;
      add_strided(tensors.x + (at / inner * channels + first) * inner + at % inner, inner, last - first, sums.data());
    }
    std::vector<Constants<A>> constants(last - first);
    for (int64_t c = 0; c < last - first; ++c)
      constants[c].center = std::isfinite(sums[c]) ? static_cast<A>(sums[c] / samples) : A(0);
    return constants;
  }

  // rounded, as the backward pass will have them
  A invstd_of(double variance) const { return static_cast<A>(1 / std::sqrt(variance + call.eps)); }
  Constants<A> constants(A mean, A invstd, int64_t c) const {
    return {mean, static_cast<A>(static_cast<double>(invstd) * load_or(call.weight, c, 1)),
            static_cast<A>(load_or(call.bias, c, 0)), A(0), A(0)};
  }

  // Where they do not depend on the sums, a run is written while it is read for them.
  bool known(int64_t c) const { return !mask(c); }
  Constants<A> known_constants(int64_t c) const {
    return constants(static_cast<A>(load(call.running.mean, c)), invstd_of(load(call.running.var, c)), c);
  }
  template <typename F>
  void writing_known(const F& f) const {
    writing(f);
  }

  Constants<A> finish(int64_t c, double sum, double second, A center) const {
    const int64_t n = call.view.per_channel();
    const double old_mean = load(call.running.mean, c), old_var = load(call.running.var, c);
    const double shifted = sum / n, batch_mean = center + shifted;
    const double difference = second - shifted * sum, squares = difference < 0 ? 0 : difference;
    mean[c] = static_cast<A>(mask(c) ? batch_mean : old_mean), invstd[c] = invstd_of(mask(c) ? squares / n : old_var);
    const double unbiased = squares / std::max<int64_t>(n - 1, 1);
    store(call.moved.mean, c, talib_fast::moved(old_mean, batch_mean, call.momentum));
    store(call.moved.var, c, talib_fast::moved(old_var, unbiased, call.momentum));
    return constants(mean[c], invstd[c], c);
  }
};

template <typename T>
struct Backward {
  using Element = T;
  using A = acc_t<T>;
  static constexpr int kKept = 2;
  static constexpr int kDone[] = {3, 5};
  const BackwardCall& call;
  const Tensors<T> tensors{static_cast<const T*>(call.input.const_data_ptr()),
                           static_cast<const T*>(call.grad_output.const_data_ptr()),
                           static_cast<T*>(call.grad_input.mutable_data_ptr()),
                           static_cast<T*>(call.grad_residual.mutable_data_ptr()),
                           call.signs ? static_cast<bits_t<T>*>(call.signs->mutable_data_ptr()) : nullptr};
  const int moved = call.signs ? 4 : 3;
  const A* mean = static_cast<const A*>(call.statistics.const_data_ptr());
  const A* invstd = mean + call.view.channels;
  A* dweight = static_cast<A*>(call.grad_weight.mutable_data_ptr());
  A* dbias = static_cast<A*>(call.grad_bias.mutable_data_ptr());
  const ChannelMask mask = call.mask.channels;

  template <typename F>
  void summing(const F& f) const {
    with_activation<A>(call.epilogue, call.signs.has_value(), [&](auto act, auto signs) {
      f(Gradient<T, decltype(act), signs.value>{tensors, act});
    });
  }
  template <typename F>
  void writing(const F& f) const {
    if (has_dz()) return f(Gradient<T, Identity, false>{{tensors.x, dz(), tensors.out, nullptr, nullptr}, {}});
    const Piecewise<A> act(call.epilogue);
    if (call.signs) f(Gradient<T, Piecewise<A>, true>{tensors, act});
    else f(Gradient<T, Piecewise<A>, false>{tensors, act});
  }

  bool plain() const { return call.epilogue.activation == Activation::kNone; }
  bool has_dz() const { return plain() || !is_piecewise(call.epilogue.activation); }
  const T* dz() const { return plain() ? tensors.other : tensors.out; }  // after the first pass
  int begun() const { return plain() ? 2 : 3; }
  std::vector<Constants<A>> begin(int64_t first, int64_t last) const {
    std::vector<Constants<A>> constants(last - first);
    for (int64_t c = first; c < last; ++c) constants[c - first] = without_statistics(c);
    return constants;
  }
  double scale(int64_t c) const { return static_cast<double>(invstd[c]) * load_or(call.weight, c, 1); }
  Constants<A> without_statistics(int64_t c) const {
    return {mean[c], static_cast<A>(scale(c)), static_cast<A>(load_or(call.bias, c, 0)), A(0), A(0)};
  }

  bool known(int64_t c) const { return !mask(c); }
  Constants<A> known_constants(int64_t c) const {
    if (has_dz()) return {A(0), static_cast<A>(scale(c)), A(0), A(0), A(0)};
    return without_statistics(c);
  }
  template <typename F>
  void writing_known(const F& f) const {  // dx depends on dz alone
    if (has_dz()) return f(Output<T, Identity, false>{{dz(), nullptr, tensors.out, nullptr, nullptr}, {}});
    writing(f);
  }

  Constants<A> finish(int64_t c, double sum, double second, A) const {
    const double dgamma = second * invstd[c], share = scale(c) / call.view.per_channel();
    dbias[c] = static_cast<A>(sum), dweight[c] = static_cast<A>(dgamma);
    Constants<A> constants = without_statistics(c);
    if (mask(c)) {  // statistics that are not used may be infinite
      constants.slope = static_cast<A>(-share * dgamma * invstd[c]);
      constants.offset = static_cast<A>(-share * sum);
    }
    return constants;
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
      : op_(op), first_(first), last_(last), stream_(stream), begun_(op.begin(first, last)), constants_(last - first) {
    for (int64_t c = first; c < last; ++c)
      if (op.known(c)) constants_[c - first] = op.known_constants(c);
  }

  void sum(int64_t begin, int64_t end, double* totals) const {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = first_; c < last_; ++c) {
        const auto [at, n] = piece(row, c);
        op_.summing([&, at = at, n = n](const auto& step) {
          simd<SumRun>(step, at, n, begun_[c - first_], &totals[c - first_], &totals[last_ - first_ + c - first_]);
        });
        if (op_.known(c))
          op_.writing_known([&, at = at, n = n](const auto& step) {
            simd<WriteRun>(step, at, n, constants_[c - first_], stream_);
          });
      }
  }

  void finish(int64_t begin, int64_t end, const double* totals) {
    for (int64_t c = begin; c < end; ++c)
      constants_[c - first_] =
          op_.finish(c, totals[c - first_], totals[last_ - first_ + c - first_], begun_[c - first_].center);
  }

  void write(int64_t begin, int64_t end) const {
    for (int64_t row = end; row-- > begin;)  // what was read last is still in the cache
      for (int64_t c = last_; c-- > first_;) {
        if (op_.known(c)) continue;
        const auto [at, n] = piece(row, c);
        op_.writing([&, at = at, n = n](const auto& step) {
          simd<WriteRun>(step, at, n, constants_[c - first_], stream_);
        });
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
  std::vector<Constants<A>> begun_, constants_;  // of the first pass and of the second one
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
        width_(ceil_div(together_ * row_, kLanes<T>) * kLanes<T>),
        constants_(std::make_unique_for_overwrite<A[]>(5 * width_)) {
    for (int which = 0; which < 5; ++which)
      std::fill_n(constants_.get() + which * width_ + together_ * row_, width_ - together_ * row_, A(0));  // padding
    const std::vector<Constants<A>> constants = op.begin(first, last);
    for (int64_t c = first; c < last; ++c) spread(0, op.begun(), c, constants[c - first]);
    repeat(0, op.begun(), first, last);
  }

  void sum(int64_t begin, int64_t end, double* totals) const {
    const int64_t most = 256 * together_;  // summed in the accumulation dtype before the sums go into doubles
    const auto sums = std::make_unique_for_overwrite<A[]>(2 * width_);
    for (int64_t row = begin; row < end; row += most) {
      std::fill_n(sums.get(), 2 * width_, A(0));
      for_each_height(row, std::min(end, row + most), [&](int64_t at, int64_t rows, int64_t count) {
        op_.summing([&](const auto& step) {
          simd<SumRows>(step, at, rows, count * stride(), count * row_, constants_.get(), width_, sums.get());
        });
      });
      for (int which = 0; which < 2; ++which)
        add_columns<T>(sums.get() + which * width_, together_, last_ - first_, op_.call.view.inner,
                       totals + which * (last_ - first_));
    }
  }

  void finish(int64_t begin, int64_t end, const double* totals) {
    for (int64_t c = begin; c < end; ++c) {
      const A center = constants_[(c - first_) * op_.call.view.inner];
      spread(Op::kDone[0], Op::kDone[1], c,
             op_.finish(c, totals[c - first_], totals[last_ - first_ + c - first_], center));
    }
    repeat(Op::kDone[0], Op::kDone[1], begin, end);
  }

  void write(int64_t begin, int64_t end) const {
    for_each_height(begin, end, [&](int64_t at, int64_t rows, int64_t count) {
      const int64_t distance = count * stride();
      const bool aligned = at * sizeof(T) % 64 == 0 && distance * sizeof(T) % 64 == 0;
      op_.writing([&](const auto& step) {
        simd<WriteRows>(step, at, rows, distance, count * row_, constants_.get(), width_, stream_ && aligned);
      });
    });
  }

 private:
  int64_t stride() const { return op_.call.view.channels * op_.call.view.inner; }
  int64_t address(int64_t row) const { return row * stride() + first_ * op_.call.view.inner; }
  // of constants [from, to)
  void spread(int from, int to, int64_t c, const Constants<A>& constants) {
    const int64_t inner = op_.call.view.inner;
    const A values[] = {constants.center, constants.scale, constants.bias, constants.slope, constants.offset};
    for (int which = from; which < to; ++which)
      std::fill_n(constants_.get() + which * width_ + (c - first_) * inner, inner, values[which]);
  }
  // and for the copies of channels [begin, end)
  void repeat(int from, int to, int64_t begin, int64_t end) {
    const int64_t inner = op_.call.view.inner;
    for (int which = from; which < to; ++which)
      for (int64_t copy = 1; copy < together_; ++copy) {
        A* const original = constants_.get() + which * width_ + (begin - first_) * inner;
        std::copy_n(original, (end - begin) * inner, original + copy * row_);
      }
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
  int64_t together_, row_, width_;
  std::unique_ptr<A[]> constants_;  // [center, scale, bias, slope, offset] x columns, which are padded to whole vectors
};

// A thread takes some channels through both passes where their values stay in its own cache between the two. Where no
// such block is wide enough, or there are too few, all threads share the rows of all channels.
template <template <typename> class Layout, typename Op>
void walk(const Op& op) {
  constexpr int64_t kSize = sizeof(typename Op::Element), kTasks = 4;
  const ChannelView& view = op.call.view;
  const int64_t rows = Layout<Op>::rows(view), channels = view.channels, elements = view.per_channel() * channels;
  const int64_t threads = torch::stable::get_num_threads();
  const auto misaligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 != 0; };
  const bool stream = op.moved * elements * kSize > kSharedCache && !misaligned(op.tensors.out) &&
                      !misaligned(op.tensors.grad_residual);

  const int64_t narrowest = Layout<Op>::narrowest(view);
  const int64_t widest = Layout<Op>::widest(kOwnCache / (Op::kKept * view.per_channel() * kSize));
  // A block that the core's cache does not hold has to be worth it: with few for each thread, the last ones leave many
  // threads idle.
  const bool fits = Op::kKept * view.per_channel() * kSize <= kOwnCache;
  const int64_t rounds = ceil_div(channels, threads);
  // Maps in channels_last that stay in the cores' caches are best taken by rows, as other operators' threads took them.
  const bool resident = view.inner == 1 && Op::kKept * elements * kSize <= kOwnCache * threads;
  if (!resident && widest >= narrowest && channels >= threads && (fits || 5 * channels >= 4 * rounds * threads)) {
    int64_t width = std::clamp(ceil_div(channels, kTasks * threads), narrowest, widest);
    const int64_t lines = 64 / kSize / std::gcd(view.inner, 64 / kSize);  // so many channels are whole cache lines
    if (width > lines) width -= width % lines;
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
  const int64_t bytes = view.per_channel() * view.channels * sizeof(typename Op::Element);
  advise_huge_pages(op.tensors.out, bytes);
  if (op.tensors.grad_residual != nullptr && op.moved > 3) advise_huge_pages(op.tensors.grad_residual, bytes);
  if (view.inner >= kLongRun) walk<Runs>(op);
  else walk<Rows>(op);
}

struct Kernels {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  static void forward(const ForwardCall& call) {
    if (call.batches != nullptr) ++*call.batches;
    dispatch(float_type(call.input), [&](auto zero) {
      const Forward<decltype(zero)> op{call};
      op.clear_signs();
      if (call.input.numel() != 0) return run(op);
      for (int64_t c = 0; c < call.view.channels; ++c) {
        const double mean = load(call.running.mean, c), var = load(call.running.var, c);
        op.mean[c] = mean, op.invstd[c] = op.invstd_of(var);
        store(call.moved.mean, c, mean), store(call.moved.var, c, var);
      }
    });
  }

  static void backward(const BackwardCall& call) {
    dispatch(float_type(call.input), [&](auto zero) {
      const Backward<decltype(zero)> op{call};
      if (call.input.numel() != 0) return run(op);
      std::fill_n(op.dweight, call.view.channels, 0);
      std::fill_n(op.dbias, call.view.channels, 0);
    });
  }
};

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CPU, m) {
  if (!talib_fast::processor_serves_kernels()) return;
  using Operators = talib_fast::Operators<talib_fast::Kernels>;
  m.impl("stoch_norm_forward", TORCH_BOX(&Operators::forward));
  m.impl("stoch_norm_functional", TORCH_BOX(&Operators::functional));
  m.impl("stoch_norm_backward", TORCH_BOX(&Operators::backward));
}
