// What the CPU and the CUDA kernel of soft_threshold share: operands, checked and brought into a form that both can
// walk. Python has checked them before, and says more; this is for those who call the operators themselves.
#pragma once

#include "operands.h"

namespace talib_fast {

// Dense tensors that lie in memory alike: an operation on single elements sees one run of `elements`, whatever the
// shape. operands.h has what others need: channels in a layout, sources in another order, numbers by channel.
struct ThresholdCall {
  Tensor input, grad_output, output;  // grad_output: of the backward pass alone; output: its gradient there
  int64_t elements;
};

inline ThresholdCall threshold_call(const Tensor& input) {
  float_type(input);  // raises if it is not floating point
  Tensor output = dense_like(input);
  return {laid_out_as(input, output), {}, output, input.numel()};
}

inline ThresholdCall threshold_gradient_call(const Tensor& grad_output, const Tensor& input) {
  STD_TORCH_CHECK(grad_output.dim() == input.dim() && grad_output.scalar_type() == input.scalar_type() &&
                      grad_output.device() == input.device(),
                  "expected grad_output of the input's shape, dtype and device");
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    STD_TORCH_CHECK(grad_output.size(dim) == input.size(dim), "expected grad_output of the input's shape");
  ThresholdCall call = threshold_call(input);
  call.grad_output = laid_out_as(grad_output, call.output);
  return call;
}

}  // namespace talib_fast
