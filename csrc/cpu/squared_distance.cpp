// Half squared distances over a list of tensors on the CPU, and their gradients. All tensors are cut into pieces, which
// threads take one by one.
#include "../squared_distance.h"

#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "simd.h"
#include "tasks.h"

namespace talib_fast {
namespace {

// ---- Loops over a run of elements. Without kSource the sources are zeros; with kWeights each element has its own.

template <bool kSource, bool kWide, typename T, typename S>
INLINE lanes_t<T> difference(const T* t, const S* s) {
  if constexpr (kSource) return load_lanes<kWide>(t) - load_lanes<kWide>(s);
  else return load_lanes<kWide>(t);
}

template <bool kSource, typename T, typename S>
INLINE acc_t<T> single_difference(const T* t, const S* s) {
  const acc_t<T> value = static_cast<acc_t<T>>(*t);
  if constexpr (kSource) return value - static_cast<acc_t<T>>(*s);
  else return value;
}

template <bool kSource, bool kWeights>
struct SumRun {
  template <bool kWide, typename T, typename S, typename A>
  static INLINE double run(const T* t, const S* s, const A* w, int64_t n) {
    using V = lanes_t<T>;
    constexpr int64_t kStep = kLanes<T>, kStreams = 4, kBlock = 8192;
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {  // summed in the accumulation dtype, then in double
      const int64_t end = std::min(n, begin + kBlock);
      V sums[kStreams] = {};
      const auto add = [&](int64_t i, V& to) __attribute__((always_inline)) {
        const V d = difference<kSource, kWide>(t + i, s + i);
        if constexpr (kWeights) to += d * d * load_lanes(w + i);
        else to += d * d;
      };
      const int64_t quarter = (end - begin) / kStreams / kStep * kStep;  // memory serves several streams faster
      for (int64_t i = begin; i < begin + quarter; i += kStep)
#pragma GCC unroll 4
        for (int64_t k = 0; k < kStreams; ++k) add(i + k * quarter, sums[k]);
      int64_t i = begin + kStreams * quarter;
      for (; i + kStep <= end; i += kStep) add(i, sums[0]);
      A rest = 0;
      for (; i < end; ++i) {
        const A d = single_difference<kSource>(t + i, s + i);
        rest += kWeights ? d * d * w[i] : d * d;
      }
      sum += total<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    }
    return sum;
  }
};

template <bool kSource, bool kWeights>
struct WriteRun {
  template <bool kWide, typename T, typename S, typename A>
  static INLINE void run(const T* t, const S* s, const A* w, T* out, int64_t n, A factor, bool stream) {
    using V = lanes_t<T>;
    constexpr int64_t kStep = kLanes<T>, kPair = 2 * kStep;
    const V factors = V{} + factor;
    const auto single = [&](int64_t i) __attribute__((always_inline)) {
      const A d = single_difference<kSource>(t + i, s + i) * factor;
      out[i] = static_cast<T>(kWeights ? d * w[i] : d);
    };
    const auto lanes = [&](int64_t i) __attribute__((always_inline)) {
      const V d = difference<kSource, kWide>(t + i, s + i) * factors;
      if constexpr (kWeights) return d * load_lanes(w + i);
      else return d;
    };
    int64_t i = 0;
    if (stream) {
      for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64 != 0; ++i) single(i);
      for (; i + kPair <= n; i += kPair) store_lanes<true, kWide>(out + i, {lanes(i), lanes(i + kStep)});
    }
    for (; i + kPair <= n; i += kPair) store_lanes<false, kWide>(out + i, {lanes(i), lanes(i + kStep)});
    for (; i < n; ++i) single(i);
  }
};

// The weights of n elements from `at` on, in memory for n and one lane's length more.
template <typename T>
SIMD_CLONES void spread_weights(const acc_t<T>* w, int64_t channels, int64_t inner, int64_t at, int64_t n,
                                acc_t<T>* to) {
  int64_t channel = at / inner % channels, left = inner - at % inner;
  for (int64_t begin = 0; begin < n;) {
    const int64_t end = std::min(n, begin + left);
    const lanes_t<T> weight = lanes_t<T>{} + w[channel];
    for (int64_t i = begin; i < end; i += kLanes<T>) store_lanes(to + i, weight);  // the next run overwrites the excess
    begin = end, left = inner;
    if (++channel == channels) channel = 0;
  }
}

// ---- The operation. All terms are cut into pieces; a piece is one task.

// A term with its addresses. For a long run of a channel's elements the weight is one number. For short runs the
// weights are spread over a few thousand elements at a time. For the shortest they are spread once over a row of all
// channels, if that is not too long.
template <typename T, typename S, bool kSource>
class Walk {
  using A = acc_t<T>;

 public:
  explicit Walk(const Term& term)
      : t_(static_cast<const T*>(term.target.const_data_ptr())),
        s_(sources(term)),
        exchange_(term.exchange),
        out_(term.gradient ? static_cast<T*>(term.gradient->mutable_data_ptr()) : nullptr),
        view_(term.view),
        w_(term.weight ? static_cast<const A*>(term.weight->const_data_ptr()) : nullptr) {
    const int64_t row = view_.channels * view_.inner;
    if (w_ == nullptr || view_.inner >= kShortRun || row == 0 || row > kLongestRow) return;
    const int64_t repeats = std::min(view_.outer, ceil_div(kBuffer, row));
    row_size_ = row * repeats;
    if (view_.inner == 1 && repeats == 1) return;  // the weights are a row as they are
    row_.resize(row_size_ + kLanes<T>);
    spread_weights<T>(w_, view_.channels, view_.inner, 0, row_size_, row_.data());
  }

  double sum(int64_t begin, int64_t end) const {
    double result = 0;
    for_each_run(begin, end, [&](int64_t at, int64_t n, const S* s, const A* weights, A weight) {
      if (weights == nullptr) result += weight * simd<SumRun<kSource, false>>(t_ + at, s, weights, n);
      else result += simd<SumRun<kSource, true>>(t_ + at, s, weights, n);
    });
    return result;
  }

  void write(int64_t begin, int64_t end, A grad, bool stream) const {
    for_each_run(begin, end, [&](int64_t at, int64_t n, const S* s, const A* weights, A weight) {
      if (weights == nullptr)
        simd<WriteRun<kSource, false>>(t_ + at, s, weights, out_ + at, n, static_cast<A>(grad * weight), stream);
      else simd<WriteRun<kSource, true>>(t_ + at, s, weights, out_ + at, n, grad, stream);
    });
  }

 private:
  static constexpr int64_t kLongRun = 2048, kShortRun = 16, kBuffer = 4096, kLongestRow = 65536;

  static const S* sources(const Term& term) {
    const Tensor& tensor = kSource ? *term.source : term.target;  // without sources only the address is used
    return static_cast<const S*>(tensor.const_data_ptr());
  }

  // f(first element, number of them, their sources, their weights or null, the weight of all)
  template <typename F>
  void for_each_run(int64_t begin, int64_t end, const F& f) const {
    const bool exchanged = exchange_.rows != 0, long_runs = view_.inner >= kLongRun, in_row = row_size_ != 0;
    const A* row = row_.empty() ? w_ : row_.data();
    const bool spread_out = w_ != nullptr && !long_runs && !in_row;
    std::vector<S> sources(exchanged ? kBuffer : 0);
    std::vector<A> weights(spread_out ? kBuffer + kLanes<T> : 0);
    for (int64_t at = begin; at < end;) {
      int64_t n = end - at;
      if (exchanged || spread_out) n = std::min(n, kBuffer);
      if (w_ != nullptr && long_runs) n = std::min(n, view_.inner - at % view_.inner);
      const int64_t offset = in_row ? at % row_size_ : 0;
      if (in_row) n = std::min(n, row_size_ - offset);
      if (exchanged) gather(at, n, sources.data());
      if (spread_out) spread_weights<T>(w_, view_.channels, view_.inner, at, n, weights.data());
      const S* s = exchanged ? sources.data() : s_ + at;
      if (w_ == nullptr) f(at, n, s, nullptr, A(1));
      else if (long_runs) f(at, n, s, nullptr, w_[at / view_.inner % view_.channels]);
      else f(at, n, s, in_row ? row + offset : weights.data(), A(1));
      at += n;
    }
  }

  // The sources of n elements from `at` on, in the target's order.
  void gather(int64_t at, int64_t n, S* to) const {
    const auto [rows, columns, unit] = exchange_;
    while (n > 0) {
      const int64_t in_unit = at % unit, cell = at / unit, column = cell % columns, row = cell / columns % rows;
      const S* from = s_ + (cell - row * columns - column + column * rows + row) * unit + in_unit;
      int64_t done;
      if (unit == 1) {  // along a row
        done = std::min(n, columns - column);
        for (int64_t i = 0; i < done; ++i) to[i] = from[i * rows];
      } else {
        done = std::min(n, unit - in_unit);
        std::copy_n(from, done, to);
      }
      at += done, n -= done, to += done;
    }
  }

  const T* t_;
  const S* s_;
  Exchange exchange_;
  T* out_;
  ChannelView view_;
  const A* w_;
  int64_t row_size_ = 0;
  std::vector<A> row_;  // empty where the weights themselves are one
};

// f(a Walk over the term)
template <typename F>
void with_walk(const Term& term, const F& f) {
  const FloatType type = float_type(term.target);
  if (!term.source) {
    with_type(type, [&](auto zero) { f(Walk<decltype(zero), decltype(zero), false>(term)); });
  } else {
    with_pair<Half, BFloat16>(type, float_type(*term.source),
                              [&](auto t, auto s) { f(Walk<decltype(t), decltype(s), true>(term)); });
  }
}

struct Piece {
  size_t term;
  int64_t begin, end;
};

// The pieces of all terms, and how many elements they have.
std::pair<std::vector<Piece>, int64_t> cut(const std::vector<Term>& terms) {
  constexpr int64_t kPiece = 65536;
  std::vector<Piece> pieces;
  int64_t elements = 0;
  for (size_t j = 0; j < terms.size(); ++j) {
    const int64_t n = terms[j].target.numel();
    for (int64_t begin = 0; begin < n; begin += kPiece) pieces.push_back({j, begin, std::min(n, begin + kPiece)});
    elements += n;
  }
  return {std::move(pieces), elements};
}

void store(const Tensor& to, int64_t i, double value) {
  if (to.scalar_type() == ScalarType::Double) static_cast<double*>(to.mutable_data_ptr())[i] = value;
  else static_cast<float*>(to.mutable_data_ptr())[i] = static_cast<float>(value);
}

double number(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double) return *static_cast<const double*>(tensor.const_data_ptr());
  return *static_cast<const float*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor> squared_distance_forward(const std::vector<Tensor>& targets,
                                                    const std::vector<Tensor>& sources,
                                                    const std::vector<Tensor>& weights, int64_t channel_dim) {
  const std::vector<Term> terms = make_terms(targets, sources, weights, channel_dim, false);
  std::vector<std::function<double(int64_t, int64_t)>> sum;
  sum.reserve(terms.size());
  for (const Term& term : terms)
    with_walk(term, [&](auto walk) {
      sum.emplace_back([walk = std::move(walk)](int64_t begin, int64_t end) { return walk.sum(begin, end); });
    });
  const auto [pieces, elements] = cut(terms);
  std::vector<double> sums(pieces.size()), halves(terms.size());
  for_each_task(pieces.size(), elements,
                [&, &pieces = pieces](int64_t i) { sums[i] = sum[pieces[i].term](pieces[i].begin, pieces[i].end); });
  for (size_t i = 0; i < pieces.size(); ++i) halves[pieces[i].term] += sums[i] / 2;

  const ScalarType type = result_type(targets);
  const Tensor total = empty_number(targets[0], type);
  const Tensor values = empty_vector(targets[0], static_cast<int64_t>(terms.size()), type);
  double all = 0;
  for (size_t j = 0; j < halves.size(); ++j) store(values, j, halves[j]), all += halves[j];
  store(total, 0, all);
  return {total, values};
}

std::vector<Tensor> squared_distance_backward(const Tensor& grad, const std::vector<Tensor>& targets,
                                              const std::vector<Tensor>& sources, const std::vector<Tensor>& weights,
                                              int64_t channel_dim) {
  if (targets.empty()) return {};
  const double factor = number(checked_grad(grad, targets[0]));
  const std::vector<Term> terms = make_terms(targets, sources, weights, channel_dim, true);
  const auto [pieces, elements] = cut(terms);
  std::vector<std::function<void(int64_t, int64_t)>> write;
  write.reserve(terms.size());
  int64_t bytes = 0;
  for (const Term& term : terms)
    bytes += term.target.numel() * (2 * term.target.element_size() + (term.source ? term.source->element_size() : 0));
  for (const Term& term : terms) {
    advise_huge_pages(term.gradient->mutable_data_ptr(), term.target.numel() * term.target.element_size());
    with_walk(term, [&, stream = bytes > kSharedCache](auto walk) {
      write.emplace_back([walk = std::move(walk), factor, stream](int64_t begin, int64_t end) {
        walk.write(begin, end, factor, stream);
        settle(stream);
      });
    });
  }
  for_each_task(pieces.size(), elements,
                [&, &pieces = pieces](int64_t i) { write[pieces[i].term](pieces[i].begin, pieces[i].end); });
  return gradients(terms);
}

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CPU, m) {
  if (!talib_fast::processor_serves_kernels()) return;
  m.impl("squared_distance_forward", TORCH_BOX(&talib_fast::squared_distance_forward));
  m.impl("squared_distance_backward", TORCH_BOX(&talib_fast::squared_distance_backward));
}
