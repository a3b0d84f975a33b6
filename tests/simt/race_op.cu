// An operation with a planted race. It shows that the race is found when Python calls the operation through torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "planted_bugs.cuh"

namespace {

using torch::stable::Tensor;

// (64,) float32
Tensor rotated(const Tensor& like, bool planted) {
  STD_TORCH_CHECK(like.dim() == 1 && like.size(0) == 64 && like.is_contiguous(), "expected 64 elements");
  Tensor out = torch::stable::new_empty(like, {64});
  if (planted) {
    SIMT_LAUNCH(talib_fast::missing_barrier<true>, 1, 64, 0, simt::current_stream(), out.mutable_data_ptr<float>());
  } else {
    SIMT_LAUNCH(talib_fast::missing_barrier<false>, 1, 64, 0, simt::current_stream(), out.mutable_data_ptr<float>());
  }
  return out;
}

// (64,) float32
Tensor ones(const Tensor& like, bool planted) {
  Tensor out = torch::stable::new_empty(like, {64});
  if (planted) {
    SIMT_LAUNCH(talib_fast::shared_overflow<true>, 1, 32, 0, simt::current_stream(), out.mutable_data_ptr<float>());
  } else {
    SIMT_LAUNCH(talib_fast::shared_overflow<false>, 1, 32, 0, simt::current_stream(), out.mutable_data_ptr<float>());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(talib_fast_simt_test, m) {
  m.def("rotated(Tensor like, bool planted) -> Tensor");
  m.def("ones(Tensor like, bool planted) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(talib_fast_simt_test, CPU, m) {
  m.impl("rotated", TORCH_BOX(&rotated));
  m.impl("ones", TORCH_BOX(&ones));
}
