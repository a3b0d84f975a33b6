// The tail of a spectrum on the GPU: the k smallest squared singular values of matrices m × n, m <= n, their sum, and
// its gradient. Three launches for a whole list of tensors of matrices:
//
// gram_kernel:   a block computes a tile of a Gram matrix, in double, over a slice of the columns.
// solve_kernel:  a block takes one Gram matrix into shared memory and brings it into tridiagonal form. It finds the k
//                smallest eigenvalues, or the m - k largest, by bisection, and their vectors by inverse iteration.
// value_kernel:  computes the value from the matrix itself, which keeps the digits that squaring lost.
//
// gradient_kernel is the backward pass. All sums are taken in an order that depends on shapes and launch parameters
// only: equal input gives equal bits.
#pragma once

#include "spectral_tail/gram.cuh"
#include "spectral_tail/plan.cuh"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace talib_fast::spectral_tail {

// f(list, blocks) for as many operands at a time as a launch takes
template <typename Blocks, typename F>
void in_lists(const std::vector<Operand>& operands, const Blocks& blocks, const F& f) {
  for (size_t first = 0; first < operands.size(); first += kOperands) {
    List list{};
    int64_t sum = 0;
    for (size_t i = first; i < std::min(operands.size(), first + kOperands); ++i) {
      list.operands[list.count] = operands[i];
      list.operands[list.count++].first_block = static_cast<unsigned>(sum);
      sum += blocks(operands[i]);
    }
    if (sum > std::numeric_limits<int>::max()) throw std::runtime_error("spectral_tail: too many matrices");
    if (sum > 0) f(list, static_cast<unsigned>(sum));
  }
}

inline void launch_solvers(const std::vector<Operand>& operands, const Device& device, cudaStream_t stream) {
  const auto launch = [&](auto columns, auto spilled) {
    std::vector<Operand> alike;
    int64_t bytes = 0;
    for (const Operand& operand : operands)
      if (solver_columns(operand) == columns() && (operand.spilled_rows != 0) == spilled())
        alike.push_back(operand), bytes = std::max(bytes, solver_bytes(operand));
    if (alike.empty()) return;
    constexpr int kColumns = columns();
    constexpr bool kSpilled = spilled();
    allow_shared_bytes(solve_kernel<kColumns, kSpilled>, bytes, device);
    in_lists(
        alike, [](const Operand& operand) { return operand.matrices.count; },
        [&](const List& list, unsigned blocks) {
          SIMT_LAUNCH((solve_kernel<kColumns, kSpilled>), dim3(blocks), dim3(solver_threads(alike[0], device)), bytes,
                      stream, list);
        });
  };
  const auto launch_both = [&](auto columns) { launch(columns, std::false_type{}), launch(columns, std::true_type{}); };
  launch_both(std::integral_constant<int, 2>{});
  launch_both(std::integral_constant<int, 4>{});
  launch_both(std::integral_constant<int, 8>{});
}

// f(list, blocks, bytes of shared memory) for launches of value_kernel or gradient_kernel
template <typename F>
void over_columns(const std::vector<Operand>& operands, const F& f) {
  in_lists(
      operands, [](const Operand& operand) { return operand.matrices.count * chunks(operand); },
      [&](const List& list, unsigned blocks) {
        int64_t bytes = 0;
        for (int i = 0; i < list.count; ++i) {
          const Operand& operand = list.operands[i];
          const int64_t element_bytes = operand.type == FloatType::kDouble ? sizeof(double) : sizeof(float);
          bytes = std::max(bytes, column_bytes(operand.matrices.m, operand.directions, operand.columns, element_bytes));
        }
        f(list, blocks, bytes);
      });
}

inline void launch_forward(const std::vector<Operand>& operands, const Device& device, cudaStream_t stream) {
  in_lists(
      operands,
      [](const Operand& operand) -> int64_t {
        const int pairs = triangle_size(static_cast<int>(ceil_div(operand.matrices.m, kTile)));
        return operand.directions == 0 ? 0 : operand.matrices.count * operand.slices * pairs;
      },
      [&](const List& list, unsigned blocks) {
        SIMT_LAUNCH(gram_kernel, dim3(blocks), dim3(kGramThreads), 0, stream, list);
      });
  launch_solvers(operands, device, stream);
  over_columns(operands, [&](const List& list, unsigned blocks, int64_t bytes) {
    SIMT_LAUNCH(value_kernel, dim3(blocks), dim3(kColumnThreads), bytes, stream, list);
  });
}

inline void launch_backward(const std::vector<Operand>& operands, cudaStream_t stream) {
  over_columns(operands, [&](const List& list, unsigned blocks, int64_t bytes) {
    SIMT_LAUNCH(gradient_kernel, dim3(blocks), dim3(kColumnThreads), bytes, stream, list);
  });
}

}  // namespace talib_fast::spectral_tail
