// What either pass does with one vector of elements. They fill all lanes (`Whole`), or the first ones (`Part`).
#pragma once

#include "activation.h"

#include <type_traits>

namespace talib_fast {
namespace {

template <typename T>
struct Tensors {
  const T *x, *residual_or_dy;
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
        z += lanes.load(tensors.residual_or_dy + i);
        if (tensors.signs != nullptr) write_bits(tensors.signs, i, lanes.count(), lanes.bits(act.passes(lanes, z)));
      }
      y[row][v] = act(lanes, z);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) lanes.store(tensors.out + at + row * distance, y[row]);
  }
};

// The sums of dz and of dz * (x - center), and dx. dz is also the residual's gradient; with a residual, signs say where
// the activation's derivative is 1. A smooth derivative takes longer to compute than dz to store and load, so dz is
// left where dx will be.
template <typename T, typename Act, bool kSigns>
struct Gradient {
  using Element = T;
  Tensors<T> tensors;
  Act act;

  bool has_signs() const { return false; }  // to be written

  template <typename Access, typename V>
  INLINE V dz(const Access& lanes, int64_t at, const Constants<V>& c, const V& difference) const {
    const V dy = lanes.load(tensors.residual_or_dy + at), z = difference * c.scale + c.bias;
    if constexpr (std::is_same_v<Act, Identity>) {
      return dy;
    } else if constexpr (is_smooth<Act>) {
      return act.gradient(lanes, z, dy);
    } else if constexpr (kSigns) {
      const int bits = read_bits(tensors.signs, at, lanes.count());
      return act.gradient(lanes, lanes.template of_bits<V>(bits), dy);
    } else {
      return act.gradient(lanes, act.passes(lanes, z), dy);
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

}  // namespace
}  // namespace talib_fast
