// One matrix [m, n], m <= n, of any strides: its columns in double, and their Gram matrix.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../tasks.h"
#include "doubles.h"

namespace talib_fast {
namespace {

template <typename T>
struct Matrix {
  T* data;
  int64_t m, n, row, column;  // the last two: strides
};

// Columns [begin, end) in double, [m, stride], with zeros behind a row's last up to a whole vector.
template <typename T>
SIMD_CLONES void pack(const Matrix<const T>& from, int64_t begin, int64_t end, double* to, int64_t stride) {
  const int64_t n = end - begin;
  for (int64_t i = 0; i < from.m; ++i) {
    const T* row = from.data + i * from.row + begin * from.column;
    double* out = to + i * stride;
    if (from.column == 1)
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(static_cast<acc_t<T>>(row[j]));
    else
      for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(static_cast<acc_t<T>>(row[j * from.column]));
    for (int64_t j = n; j < round_up(n, kDoubles); ++j) out[j] = 0;
  }
}

template <typename T>
SIMD_CLONES void unpack(const double* from, int64_t width, int64_t begin, int64_t end, const Matrix<T>& to) {
  for (int64_t i = 0; i < to.m; ++i) {
    T* row = to.data + i * to.row + begin * to.column;
    for (int64_t j = 0; j < end - begin; ++j)
      row[j * to.column] = static_cast<T>(static_cast<acc_t<T>>(from[i * width + j]));
  }
}

constexpr int64_t kTile = 4;

// Adds the columns' Gram matrix to the upper triangle of `gram`, [size, size]. `columns`: [size, stride], `width` of
// them; size and width are multiples of a tile and of a vector.
SIMD_CLONES void add_gram(const double* columns, int64_t stride, int64_t width, double* gram, int64_t size) {
  for (int64_t row = 0; row < size; row += kTile)
    for (int64_t column = row; column < size; column += kTile) {
      const double *a = columns + row * stride, *b = columns + column * stride;
      Doubles sums[kTile * kTile] = {};
      for (int64_t l = 0; l < width; l += kDoubles) {
        Doubles its[kTile];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kTile; ++j) its[j] = load_lanes(b + j * stride + l);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kTile; ++i) {
          const Doubles own = load_lanes(a + i * stride + l);
#pragma GCC unroll 4
          for (int64_t j = 0; j < kTile; ++j) sums[i * kTile + j] += own * its[j];
        }
      }
      for (int64_t half = 0; half < 2; ++half) {
        const Doubles added = sums_of(sums + half * kDoubles);
        for (int64_t lane = 0; lane < kDoubles; ++lane)
          gram[(row + half * 2 + lane / kTile) * size + column + lane % kTile] += added[lane];
      }
    }
}

// A matrix's columns in pieces that threads share. How many does not depend on the threads, so that sums don't either.
struct Pieces {
  explicit Pieces(int64_t columns) : n(columns), count(std::min<int64_t>(kMost, ceil_div(n, kColumns))) {}

  // f(columns in double, stride, width) for one piece after the other of those that fit a core's cache
  template <typename T, typename F>
  void for_each_panel(int64_t piece, const Matrix<const T>& matrix, const F& f) const {
    const int64_t size = round_up(matrix.m, kTile), share = round_up(ceil_div(n, count), kDoubles);
    const int64_t stride = std::max<int64_t>(64, std::min(share, kOwnCache / 2 / (size * 8) / kDoubles * kDoubles));
    const std::unique_ptr<double[]> columns(new double[size * stride]);
    std::fill(columns.get() + matrix.m * stride, columns.get() + size * stride, 0.0);
    const int64_t last = std::min(n, (piece + 1) * share);
    for (int64_t begin = piece * share; begin < last; begin += stride) {
      const int64_t end = std::min(last, begin + stride);
      pack(matrix, begin, end, columns.get(), stride);
      f(columns.get(), stride, round_up(end - begin, kDoubles));
    }
  }

  static constexpr int64_t kMost = 16, kColumns = 256;
  int64_t n, count;
};

}  // namespace
}  // namespace talib_fast
