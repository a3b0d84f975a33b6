// The part of a matrix that lies in the directions of the tail.
#pragma once

#include <cstdint>
#include <vector>

#include "doubles.h"

namespace talib_fast {
namespace {

// to[k, width] = vectors[k, m] times columns[m, stride]
SIMD_CLONES void project(const double* vectors, int64_t k, int64_t m, const double* columns, int64_t stride,
                         int64_t width, double* to) {
  constexpr int64_t kBlock = 4 * kDoubles;
  int64_t begin = 0;
  for (; begin + kBlock <= width; begin += kBlock)
    for (int64_t index = 0; index < k; ++index) {
      Doubles sums[4] = {};
      for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 4
        for (int64_t part = 0; part < 4; ++part)
          sums[part] += vectors[index * m + i] * load_lanes(columns + i * stride + begin + part * kDoubles);
      for (int64_t part = 0; part < 4; ++part) store_lanes(to + index * width + begin + part * kDoubles, sums[part]);
    }
  for (; begin < width; begin += kDoubles)
    for (int64_t index = 0; index < k; ++index) {
      Doubles sum = {};
      for (int64_t i = 0; i < m; ++i) sum += vectors[index * m + i] * load_lanes(columns + i * stride + begin);
      store_lanes(to + index * width + begin, sum);
    }
}

SIMD_CLONES double squared_norm(const double* values, int64_t n) { return dot(values, values, n); }

SIMD_CLONES void subtract_product(const double* rows, int64_t m, int64_t k, const double* columns, int64_t width,
                                  double* from, int64_t stride) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l) add_multiple(from + i * stride, -rows[i * k + l], columns + l * width, width);
}

// The directions of a tail or, with `complement`, of what is not: vectors [m, count] and, transposed, [count, m].
struct Basis {
  const double *by_row, *by_vector;
  int64_t m, count;
  bool complement;

  // [count, width], of columns [m, stride]
  std::vector<double> projected(const double* columns, int64_t stride, int64_t width) const {
    std::vector<double> products(count * width);
    project(by_vector, count, m, columns, stride, width, products.data());
    return products;
  }

  // Replaces columns [m, width] by their part in the tail.
  void keep_tail(double* columns, int64_t width) const {
    const std::vector<double> products = projected(columns, width, width);
    if (complement) subtract_product(by_row, m, count, products.data(), width, columns, width);
    else project(by_row, m, count, products.data(), width, width, columns);
  }

  // The squared norm of that part of columns [m, stride], which are overwritten.
  double tail_square(double* columns, int64_t stride, int64_t width) const {
    const std::vector<double> products = projected(columns, stride, width);
    if (!complement) return squared_norm(products.data(), products.size());
    subtract_product(by_row, m, count, products.data(), width, columns, stride);
    double sum = 0;
    for (int64_t i = 0; i < m; ++i) sum += squared_norm(columns + i * stride, width);
    return sum;
  }
};

}  // namespace
}  // namespace talib_fast
