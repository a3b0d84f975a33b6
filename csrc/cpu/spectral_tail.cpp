// The tail of a spectrum on the CPU: value and gradient of a matrix, and how threads share a list of them.
#include "../spectral_tail.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "spectral_tail/eigenvectors.h"
#include "spectral_tail/matrix.h"
#include "spectral_tail/projection.h"
#include "tasks.h"

namespace talib_fast {
namespace {

template <typename T, typename Pointer>
Matrix<T> matrix_at(const Matrices& shape, Pointer* data, int64_t index) {
  return {static_cast<T*>(data) + index * shape.stride, shape.m, shape.n, shape.row_stride, shape.column_stride};
}

constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// so many multiplications and additions count as one element that is read from memory, for for_each_task
constexpr int64_t kOperationsPerElement = 64;

// The value of one matrix, and `count` vectors, [m, count]: of the tail or, with `complement`, of what is not the tail.
template <typename T>
double tail(const Matrix<const T>& matrix, int64_t count, bool complement, double* vectors, bool threads) {
  const int64_t m = matrix.m, size = round_up(m, kTile);
  const int64_t elements = threads ? m * m * matrix.n / kOperationsPerElement : 0;
  const Pieces pieces(matrix.n);
  std::vector<double> rows(count * m);
  if (count > 0) {
    std::vector<double> grams(pieces.count * size * size), tau(m);
    for_each_task(pieces.count, elements, [&](int64_t piece) {
      pieces.for_each_panel(piece, matrix, [&](const double* columns, int64_t stride, int64_t width) {
        add_gram(columns, stride, width, grams.data() + piece * size * size, size);
      });
    });
    double* gram = grams.data();
    for (int64_t piece = 1; piece < pieces.count; ++piece)
      for (int64_t i = 0; i < size * size; ++i) gram[i] += grams[piece * size * size + i];
    double trace = 0;
    for (int64_t i = 0; i < m; ++i) trace += gram[i * size + i];
    if (!std::isfinite(trace)) {
      std::fill_n(vectors, m * count, kNotANumber);
      return kNotANumber;
    }
    if (trace == 0) {
      for (int64_t i = 0; i < m * count; ++i) vectors[i] = i / count == i % count;
      return 0;
    }
    const double scale = complement ? -trace : trace;  // the largest are the smallest with the other sign
    for (int64_t i = 0; i < size * size; ++i) gram[i] /= scale;
    const Tridiagonal tridiagonal = tridiagonalize(gram, m, size, tau.data());
    eigenvectors(tridiagonal, smallest_eigenvalues(tridiagonal, count), rows.data());
    reflect_back(gram, m, size, tau.data(), count, rows.data());
    for (int64_t i = 0; i < m; ++i)
      for (int64_t index = 0; index < count; ++index) vectors[i * count + index] = rows[index * m + i];
  }
  // from the matrix, not from the eigenvalues: that keeps the digits that squaring lost
  const Basis basis{vectors, rows.data(), m, count, complement};
  std::vector<double> values(pieces.count);
  for_each_task(pieces.count, elements, [&](int64_t piece) {
    pieces.for_each_panel(piece, matrix, [&](double* columns, int64_t stride, int64_t width) {
      values[piece] += basis.tail_square(columns, stride, width);
    });
  });
  const double value = std::accumulate(values.begin(), values.end(), 0.0);
  return std::isfinite(value) ? value : kNotANumber;
}

// A matrix of a list of tensors of matrices: the tensor's number in the list, and its own in the tensor.
struct Place {
  size_t tensor;
  int64_t index;
};

template <typename Call>
std::vector<Place> places(const std::vector<Call>& calls) {
  std::vector<Place> found;
  for (size_t tensor = 0; tensor < calls.size(); ++tensor)
    for (int64_t index = 0; index < calls[tensor].matrices.count; ++index) found.push_back({tensor, index});
  return found;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> spectral_tail_forward(const std::vector<Tensor>& inputs,
                                                                           const std::vector<int64_t>& k) {
  const std::vector<TailCall> calls = tail_calls(inputs, k);
  const std::vector<Place> all = places(calls);
  // Each matrix is a thread's work, or all threads take one after the other, whichever takes less time. Threads can
  // share the work on a matrix's columns, but not that on its tridiagonal form.
  double shared = 0, alone = 0, longest = 0;  // in the time of a multiplication for the Gram matrix
  for (const TailCall& call : calls) {
    const auto [count, m, n, stride, row_stride, column_stride] = call.matrices;
    const double columns = 0.5 * m * m * n, form = 1.0 * m * m * (m + 300);  // measured, for m from 16 to 256
    shared += count * columns, alone += count * form;
    if (count > 0) longest = std::max(longest, columns + form);
  }
  const double threads = torch::stable::get_num_threads();
  const bool one_by_one = shared / threads + alone < std::max(longest, (shared + alone) / threads);
  const int64_t work = one_by_one ? 0 : static_cast<int64_t>(2 * shared) / kOperationsPerElement;
  for_each_task(all.size(), work, [&](int64_t task) {
    const TailCall& call = calls[all[task].tensor];
    const int64_t index = all[task].index, count = vector_count(call.matrices, call.k);
    const bool complement = uses_complement(call.matrices, call.k);
    double* vectors = static_cast<double*>(call.vectors.mutable_data_ptr()) + index * call.matrices.m * count;
    with_type(float_type(call.input), [&](auto zero) {
      using T = decltype(zero);
      const auto matrix = matrix_at<const T>(call.matrices, call.input.const_data_ptr(), index);
      const double value = call.k == 0 ? 0 : tail(matrix, count, complement, vectors, one_by_one);
      static_cast<acc_t<T>*>(call.value.mutable_data_ptr())[index] = static_cast<acc_t<T>>(value);
    });
  });
  return results(calls);
}

// The gradient of one matrix in columns [begin, end).
template <typename T>
void write_gradient(const Matrix<const T>& matrix, const Matrix<T>& gradient, const Basis& basis, double factor,
                    int64_t begin, int64_t end) {
  const int64_t width = round_up(end - begin, kDoubles);
  std::vector<double> block(matrix.m * width);
  pack(matrix, begin, end, block.data(), width);
  basis.keep_tail(block.data(), width);
  for (double& value : block) value *= factor;
  unpack(block.data(), width, begin, end, gradient);
}

std::vector<Tensor> spectral_tail_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& inputs,
                                           const std::vector<Tensor>& vectors, const std::vector<int64_t>& k) {
  constexpr int64_t kWidth = 64;
  if (inputs.empty()) return {};
  const std::vector<TailGradientCall> calls = tail_gradient_calls(grads, inputs, vectors, k);
  for (const TailGradientCall& call : calls) {
    const Matrices &shape = call.matrices, outputs = matrices(call.gradient);
    const int64_t m = shape.m, count = vector_count(shape, call.k), blocks = ceil_div(shape.n, kWidth);
    const double* by_row = static_cast<const double*>(call.vectors.const_data_ptr());
    std::vector<double> by_vector(shape.count * count * m);
    for (int64_t index = 0; index < shape.count; ++index)
      for (int64_t i = 0; i < m * count; ++i)
        by_vector[(index * count + i % count) * m + i / count] = by_row[index * m * count + i];
    with_type(float_type(call.input), [&](auto zero) {
      using T = decltype(zero);
      for_each_task(shape.count * blocks, shape.count * shape.n * m, [&](int64_t task) {
        const int64_t index = task / blocks, begin = task % blocks * kWidth, end = std::min(shape.n, begin + kWidth);
        const int64_t at = index * m * count;
        const Basis basis{by_row + at, by_vector.data() + at, m, count, uses_complement(shape, call.k)};
        const double grad = static_cast<const acc_t<T>*>(call.grad.const_data_ptr())[index];
        write_gradient(matrix_at<const T>(shape, call.input.const_data_ptr(), index),
                       matrix_at<T>(outputs, call.gradient.mutable_data_ptr(), index), basis, 2 * grad, begin, end);
      });
    });
  }
  return results(calls);
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CPU, m) {
  m.impl("spectral_tail_forward", TORCH_BOX(&talib_fast::spectral_tail_forward));
  m.impl("spectral_tail_backward", TORCH_BOX(&talib_fast::spectral_tail_backward));
}
