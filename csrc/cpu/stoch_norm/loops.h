// Loops over memory. A run is a range of values of one channel; rows have columns, each with its own constants, and lie
// `stride` elements apart.
#pragma once

#include "steps.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace talib_fast {
namespace {

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
    const auto strip = [&](int64_t first, int64_t distance, int64_t count, int64_t column, auto vectors,
                           const auto& lanes) __attribute__((always_inline)) {
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
    };
    for_each_strip<T, kWide>(at, rows, stride, columns, false, strip);
  }
};

struct WriteRows {
  template <bool kWide, typename Step, typename A, typename T = typename Step::Element>
  static INLINE void run(const Step& step, int64_t at, int64_t rows, int64_t stride, int64_t columns,
                         const A* constants, int64_t width, bool stream) {
    const auto strip = [&](int64_t first, int64_t distance, int64_t count, int64_t column, auto vectors,
                           const auto& lanes) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      Constants<lanes_t<T>> c[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) c[v] = constants_at(constants + column + v * kLanes<T>, width);
      if constexpr (kWide)  // other registers do not hold so many rows
        if (count == kStreams) return step.template write<kStreams>(lanes, first, c, distance);
      for (int64_t row = 0; row < count; ++row) step.write(lanes, first + row * distance, c);
    };
    for_each_strip<T, kWide>(at, rows, stride, columns, stream, strip);
  }
};

// Adds the sums of each channel's columns, in as many rows as are given, to its totals.
template <typename T>
SIMD_CLONES void add_columns(const acc_t<T>* sums, int64_t rows, int64_t channels, int64_t inner, double* totals) {
  for (int64_t row = 0; row < rows; ++row) {
    if (inner == 1) {
      IVDEP
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

}  // namespace
}  // namespace talib_fast
