// The two directions. Both take two sums for each channel, derive constants from them and write with the constants.
#pragma once

#include "channel.h"
#include "loops.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace talib_fast {
namespace {

// With a momentum of 1 it is the batch's, whatever the old one is.
double updated(double running, double batch, double momentum) {
  return momentum == 1 ? batch : running + momentum * (batch - running);
}

template <typename T>
struct Forward {
  using Element = T;
  using A = acc_t<T>;
  static constexpr int kKept = 1;         // tensors that both passes read
  static constexpr int kDone[] = {0, 3};  // the constants that the sums give: from the center up to the slope
  const ForwardCall& call;
  const Tensors<T> tensors{static_cast<const T*>(call.input.const_data_ptr()),
                           call.residual ? static_cast<const T*>(call.residual->const_data_ptr()) : nullptr,
                           static_cast<T*>(call.output.mutable_data_ptr()), nullptr,
                           call.signs.numel() != 0 ? static_cast<bits_t<T>*>(call.signs.mutable_data_ptr()) : nullptr};
  const int moved_tensors = call.residual ? 3 : 2;  // that a pass reads or writes
  A* mean = static_cast<A*>(call.statistics.mutable_data_ptr());
  A* rstd = mean + call.view.channels;
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
    with_activation<A>(call.epilogue, call.residual.has_value(),
                       [&](auto act, auto residual) { f(Output<T, decltype(act), residual.value>{tensors, act}); });
  }

  // The constants that the first pass needs, and how many: a center near the mean, so that no large squares are summed.
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

  // rounded as the backward pass will read it
  A rstd_of(double variance) const { return static_cast<A>(1 / std::sqrt(variance + call.eps)); }
  Constants<A> constants(A mean, A rstd, int64_t c) const {
    return {mean, static_cast<A>(static_cast<double>(rstd) * load_or(call.weight, c, 1)),
            static_cast<A>(load_or(call.bias, c, 0)), A(0), A(0)};
  }

  // Where the constants do not depend on the sums, a run is written while it is summed.
  bool uses_running_stats(int64_t c) const { return !mask(c); }
  Constants<A> running_constants(int64_t c) const {
    return constants(static_cast<A>(load(call.running.mean, c)), rstd_of(load(call.running.var, c)), c);
  }
  template <typename F>
  void writing_running(const F& f) const {
    writing(f);
  }

  Constants<A> finish(int64_t c, double sum, double second, A center) const {
    const int64_t n = call.view.per_channel();
    const double old_mean = load(call.running.mean, c), old_var = load(call.running.var, c);
    const double shifted = sum / n, batch_mean = center + shifted;
    const double difference = second - shifted * sum, squares = difference < 0 ? 0 : difference;
    mean[c] = static_cast<A>(mask(c) ? batch_mean : old_mean), rstd[c] = rstd_of(mask(c) ? squares / n : old_var);
    const double unbiased = squares / std::max<int64_t>(n - 1, 1);
    store(call.updated.mean, c, updated(old_mean, batch_mean, call.momentum));
    store(call.updated.var, c, updated(old_var, unbiased, call.momentum));
    return constants(mean[c], rstd[c], c);
  }
};

template <typename T>
struct Backward {
  using Element = T;
  using A = acc_t<T>;
  static constexpr int kKept = 2;
  static constexpr int kDone[] = {3, 5};
  const BackwardCall& call;
  const Tensors<T> tensors{
      static_cast<const T*>(call.input.const_data_ptr()), static_cast<const T*>(call.grad_output.const_data_ptr()),
      static_cast<T*>(call.grad_input.mutable_data_ptr()), static_cast<T*>(call.grad_residual.mutable_data_ptr()),
      call.signs ? static_cast<bits_t<T>*>(call.signs->mutable_data_ptr()) : nullptr};
  const int moved_tensors = call.signs ? 4 : 3;
  const A* mean = static_cast<const A*>(call.statistics.const_data_ptr());
  const A* rstd = mean + call.view.channels;
  A* dweight = static_cast<A*>(call.grad_weight.mutable_data_ptr());
  A* dbias = static_cast<A*>(call.grad_bias.mutable_data_ptr());
  const ChannelMask mask = call.mask.channels;

  template <typename F>
  void summing(const F& f) const {
    with_activation<A>(call.epilogue, call.signs.has_value(),
                       [&](auto act, auto signs) { f(Gradient<T, decltype(act), signs.value>{tensors, act}); });
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
  const T* dz() const { return plain() ? tensors.residual_or_dy : tensors.out; }  // after the first pass
  int begun() const { return plain() ? 2 : 3; }
  std::vector<Constants<A>> begin(int64_t first, int64_t last) const {
    std::vector<Constants<A>> constants(last - first);
    for (int64_t c = first; c < last; ++c) constants[c - first] = without_statistics(c);
    return constants;
  }
  double scale(int64_t c) const { return static_cast<double>(rstd[c]) * load_or(call.weight, c, 1); }
  Constants<A> without_statistics(int64_t c) const {
    return {mean[c], static_cast<A>(scale(c)), static_cast<A>(load_or(call.bias, c, 0)), A(0), A(0)};
  }

  bool uses_running_stats(int64_t c) const { return !mask(c); }
  Constants<A> running_constants(int64_t c) const {
    if (has_dz()) return {A(0), static_cast<A>(scale(c)), A(0), A(0), A(0)};
    return without_statistics(c);
  }
  template <typename F>
  void writing_running(const F& f) const {  // dx depends on dz alone
    if (has_dz()) return f(Output<T, Identity, false>{{dz(), nullptr, tensors.out, nullptr, nullptr}, {}});
    writing(f);
  }

  Constants<A> finish(int64_t c, double sum, double second, A) const {
    const double dgamma = second * rstd[c], share = scale(c) / call.view.per_channel();
    dbias[c] = static_cast<A>(sum), dweight[c] = static_cast<A>(dgamma);
    Constants<A> constants = without_statistics(c);
    if (mask(c)) {  // statistics that are not used may be infinite
      constants.slope = static_cast<A>(-share * dgamma * rstd[c]);
      constants.offset = static_cast<A>(-share * sum);
    }
    return constants;
  }
};

}  // namespace
}  // namespace talib_fast
