// A StochNorm layer's step in training as one function, and its autograd node. In Python the same step takes longer
// than a kernel on a small map.
//
// There is no stable ABI for nodes, so this is a library of its own, built for one version of torch and of Python. The
// usual path in Python does the same, to the last bit. The function returns None where anything but autograd looks on,
// or an operand is not what a layer usually has. Python then goes on as if it had not been asked.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/rand.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "../types.h"

namespace talib_fast {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// Before it loads this library, Python looks for these bytes in its file: under another torch it might crash.
const char kBuiltFor[] = "talib_fast._autograd is built for torch=" TALIB_FAST_TORCH;

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Forward = Three(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const Tensor& running_mean, const Tensor& running_var, const Tensor& mask, double momentum,
                      double eps, double p, const OptionalTensor& num_batches_tracked, const OptionalTensor& residual,
                      int64_t activation, double negative_slope);
using Backward = Four(const Tensor& grad_output, const Tensor& input, const Tensor& statistics,
                      const OptionalTensor& weight, const Tensor& mask, double p, const OptionalTensor& bias,
                      const OptionalTensor& signs, int64_t activation, double negative_slope);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct StochNormBackward final : torch::autograd::Node {
  SavedVariable input, weight, bias;  // the latter only for an activation without signs
  Tensor mask, statistics, signs;     // nobody else has these
  double eps = 0, p = 0, negative_slope = 0;
  int64_t activation = 0;
  bool adds = false;  // a residual

  // of input, weight, bias and residual
  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return variable_list(4);
    const Tensor x = input.unpack(), gamma = weight.unpack(), beta = bias.unpack();
    const auto [dx, dweight, dbias, dresidual] =
        at::GradMode::is_enabled() ? differentiable_gradients(dy, x, gamma, beta) : gradients(dy, x, gamma, beta);
    return {dx, dweight, dbias, !adds ? Tensor() : signs.defined() ? dresidual : dy};
  }

  Four gradients(const Tensor& dy, const Tensor& x, const Tensor& gamma, const Tensor& beta) {
    static const auto backward = find_operator<Backward>("talib_fast::stoch_norm_backward");
    return backward.call(dy, x, statistics, if_defined(gamma), mask, p, if_defined(beta), if_defined(signs), activation,
                         negative_slope);
  }

  Four differentiable_gradients(const Tensor& dy, const Tensor& x, const Tensor& gamma, const Tensor& beta) {
    py::gil_scoped_acquire gil;
    return py::module_::import("talib_fast.ops.stoch_norm_formula")
        .attr("differentiable_gradients")(dy, x, if_defined(gamma), mask, statistics, if_defined(beta),
                                          if_defined(signs), p, eps, activation, negative_slope)
        .cast<Four>();
  }

  template <typename F>
  void for_each_kept(const F& f) {
    for (SavedVariable* saved : {&input, &weight, &bias}) f(*saved);
    for (Tensor* own : {&mask, &statistics, &signs}) f(*own);
  }

  static void release(SavedVariable& saved) { saved.reset_data(); }
  static void release(Tensor& own) { own.reset(); }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for_each_kept([](auto& kept) { release(kept); });
  }

  std::string name() const override { return "StochNormBackward"; }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable* saved : {&input, &weight, &bias}) args.collect(*saved, false);
    for (const Tensor* own : {&mask, &statistics, &signs}) args.collect(*own);
    for (double number : {eps, p, negative_slope}) args.collect(number);
    args.collect(activation);
    args.collect(adds);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for_each_kept([&](auto& kept) { swap.before(kept); });
    variable_list result = apply(variable_list(grads));
    for_each_kept([&](auto& kept) { swap.after(kept); });
    return result;
  }
};

// How torch holds nodes changed with 2.13.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
auto make_node() { return std::shared_ptr<StochNormBackward>(new StochNormBackward(), torch::autograd::deleteNode); }
#else
auto make_node() { return c10::make_intrusive<StochNormBackward>(); }
#endif

// Whether a call is one of the many of ordinary training: what only_autograd_looks_on() in torch_private.py asks, and
// modes that Python's own calls would meet on their way.
bool only_autograd_looks_on() {
  constexpr c10::DispatchKeySet usual = c10::default_included_set | c10::autocast_dispatch_keyset;
  return at::GradMode::is_enabled() && torch::autograd::get_current_graph_task_id() == -1 &&
         !at::SavedTensorDefaultHooks::get_hooks(true) &&
         (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() &&
         !at::impl::torch_function_mode_enabled() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// The dense tensor on a CPU or a CUDA device that `object` is, of no subclass and wrapped in nothing; else undefined.
Tensor ordinary(PyObject* object) {
  constexpr c10::DispatchKeySet usual =
      c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::ADInplaceOrView}) |
      c10::DispatchKeySet({c10::BackendComponent::CPUBit, c10::BackendComponent::CUDABit}) |
      c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset;
  if (!THPVariable_CheckExact(object)) return {};
  const Tensor& tensor = THPVariable_Unpack(object);
  return (tensor.key_set().raw_repr() & ~usual.raw_repr()) == 0 ? tensor : Tensor();
}

// What a layer's dictionary has by that name; undefined for None. `fits` becomes false where it is missing, or
// something else than an ordinary tensor.
Tensor entry(const py::dict& vectors, const py::str& name, bool& fits) {
  PyObject* found = PyDict_GetItemWithError(vectors.ptr(), name.ptr());
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  Tensor tensor = found != nullptr ? ordinary(found) : Tensor();
  if (!tensor.defined() && found != Py_None) fits = false;
  return tensor;
}

bool is_vector(const Tensor& tensor, const Tensor& input) {
  return tensor.defined() && tensor.dim() == 1 && tensor.size(0) == input.size(1) && tensor.device() == input.device();
}

bool takes_along(const Tensor& residual, const Tensor& input, Activation activation) {
  return is_piecewise(activation) && residual.defined() && residual.sizes() == input.sizes() &&
         residual.scalar_type() == input.scalar_type() && residual.device() == input.device();
}

// stoch_norm_step of talib_fast/ops/stoch_norm_step.py, with its arguments and the activation's for operators. Returns
// the output; with what the residual gave, where the operation does not take that along; or None: the call is for
// Python, and nothing has happened.
py::object stoch_norm_step(py::handle given, const py::dict& parameters, const py::dict& buffers, py::handle momentum,
                           double eps, double p, bool tracks, int64_t activation, double negative_slope,
                           py::handle residual) {
  // never freed, since Python may be gone by then
  static const auto& kWeight = *new py::str("weight");
  static const auto& kBias = *new py::str("bias");
  static const auto& kMean = *new py::str("running_mean");
  static const auto& kVar = *new py::str("running_var");
  static const auto& kCounter = *new py::str("num_batches_tracked");
  static const auto forward = find_operator<Forward>("talib_fast::stoch_norm_forward");

  const Tensor x = ordinary(given.ptr());
  if (!x.defined() || !tracks || !PyFloat_CheckExact(momentum.ptr()) || !(eps > 0) || !only_autograd_looks_on())
    return py::none();
  const at::ScalarType dtype = x.scalar_type();
  if (x.dim() < 2 || x.numel() <= x.size(1) ||
      !(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16))
    return py::none();
  bool fits = true;
  const Tensor gamma = entry(parameters, kWeight, fits), beta = entry(parameters, kBias, fits);
  const Tensor mean = entry(buffers, kMean, fits), var = entry(buffers, kVar, fits);
  const Tensor counter = entry(buffers, kCounter, fits);
  if (!fits || !is_vector(mean, x) || !is_vector(var, x) || (counter.defined() && counter.scalar_type() != at::kLong))
    return py::none();

  const Tensor drawn = [&] {
    at::AutoDispatchBelowAutograd guard;
    return at::rand({x.size(1)}, x.options().dtype(at::kFloat));
  }();
  const py::object added = residual.is_none() ? py::none() : py::reinterpret_borrow<py::function>(residual)();
  Tensor u = ordinary(added.ptr());
  const bool along = added.is_none() || takes_along(u, x, Activation{activation});
  if (!along) u.reset(), activation = 0, negative_slope = 0;
  const double share = PyFloat_AS_DOUBLE(momentum.ptr());

  Tensor output;
  {
    py::gil_scoped_release others_may_run;
    const bool recorded = torch::autograd::compute_requires_grad(x, gamma, beta, u);
    Tensor statistics, signs;
    {
      at::AutoDispatchBelowAutograd guard;
      std::tie(output, statistics, signs) =
          forward.call(x, if_defined(gamma), if_defined(beta), mean, var, drawn, share, eps, p, if_defined(counter),
                       if_defined(u), activation, negative_slope);
    }
    if (recorded) {
      auto node = make_node();
      node->set_next_edges(torch::autograd::collect_next_edges(x, gamma, beta, u));
      const bool keeps_signs = u.defined() && activation != 0;
      node->input = SavedVariable(x, false);
      node->weight = SavedVariable(gamma, false);
      if (activation != 0 && !keeps_signs) node->bias = SavedVariable(beta, false);
      if (keeps_signs) node->signs = signs;
      node->mask = drawn;
      node->statistics = statistics;
      node->eps = eps;
      node->p = p;
      node->activation = activation;
      node->negative_slope = negative_slope;
      node->adds = u.defined();
      torch::autograd::set_history(output, node);
    }
  }
  if (along) return py::cast(output);
  return py::make_tuple(output, added);
}

struct NotFromPython {
  torch::autograd::Node* operator()(PyObject*) const {
    throw std::runtime_error("StochNormBackward is made by layers");
  }
};

}  // namespace
}  // namespace talib_fast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace talib_fast;
  static PyTypeObject type;
  torch::autograd::createForwardFunctionPyTypeObject<NotFromPython>(type, "StochNormBackward");
  torch::autograd::registerCppFunction(typeid(StochNormBackward), &type);
  module.attr("built_for") = kBuiltFor;
  module.def("stoch_norm_step", torch::wrap_pybind_function(stoch_norm_step));  // which knows torch's errors
}
