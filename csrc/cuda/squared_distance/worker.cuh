// One thread's work on its share of a tensor. It loads vectors of the target, with the source's and the weights, and
// sums up squares or writes the gradient.
#pragma once

#include "../../types.h"
#include "../runtime.cuh"
#include "operand.cuh"

#include <cstdint>
#include <type_traits>

namespace talib_fast::squared_distance {

constexpr int kThreads = 256;

// Where in the weights a thread is. It goes from one of its vectors to the next in equal steps, without divisions.
class WeightWalk {
 public:
  __device__ __forceinline__ WeightWalk(const Operand& operand, int64_t first, int64_t step)
      : channels_(operand.channels), inner_(operand.inner) {
    locate(first, channel_, in_run_);
    locate(step, jump_, jump_in_run_);
  }

  // f(k, channel) for each of V elements from here on
  template <int V, typename F>
  __device__ __forceinline__ void each(const F& f) const {
    int64_t channel = channel_, in_run = in_run_;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      f(k, channel);
      if (++in_run == inner_) {
        in_run = 0;
        if (++channel == channels_) channel = 0;
      }
    }
  }

  __device__ __forceinline__ void advance() {
    in_run_ += jump_in_run_;
    channel_ += jump_;
    if (in_run_ >= inner_) in_run_ -= inner_, ++channel_;
    if (channel_ >= channels_) channel_ -= channels_;
  }

 private:
  __device__ __forceinline__ void locate(int64_t element, int64_t& channel, int64_t& in_run) const {
    const int64_t run = divide(element, inner_);
    in_run = element - run * inner_;
    channel = run - divide(run, channels_) * channels_;
  }

  int64_t channels_, inner_;
  int64_t channel_, in_run_;
  int64_t jump_, jump_in_run_;
};

// What a thread reads of the sources: nothing, vectors that lie as the target's, or single elements of another order.
enum class Source { kNone, kAlike, kExchanged };  // the last one with weights or without

// What one thread does to its share of [begin, end) of an operand. T, S: dtypes of target and source; V elements a
// vector. walk calls f(first element, differences, weights) for every vector.
template <typename T, typename S, Source kSource, bool kWeights, int V>
struct Worker {
  using Element = T;
  using A = acc_t<T>;
  static constexpr int kVector = V;
  // vectors of target that are loaded before one is used
  static constexpr int kUnroll =
      (V == 8 || kSource == Source::kExchanged ? 2 : 4) * (kSource == Source::kNone && !kWeights ? 2 : 1);
  static constexpr int kSourceVector = V * sizeof(S) > 16 ? 16 / sizeof(S) : V;  // elements that load at once

  const T* target;
  const S* source;
  const A* weight;
  const Operand& operand;

  __device__ __forceinline__ explicit Worker(const Operand& operand)
      : target(static_cast<const T*>(operand.target)),
        source(static_cast<const S*>(operand.source)),
        weight(static_cast<const A*>(operand.weight)),
        operand(operand) {}

  template <typename F>
  __device__ __forceinline__ void walk(int64_t begin, int64_t end, const F& f) const {
    constexpr int64_t kStep = kThreads * V;
    const int64_t at = begin + threadIdx.x * V;
    A factors[V];
    if constexpr (kWeights) {
      WeightWalk weights(operand, at, kStep);
      walk_vectors(at, end, kStep, [&](int64_t here, const A(&differences)[V]) {
        weights.template each<V>([&](int k, int64_t channel) {
          factors[k] = kSource == Source::kExchanged && weight == nullptr ? A(1) : weight[channel];
        });
        f(here, differences, factors);
        weights.advance();
      });
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) factors[k] = 1;
      walk_vectors(at, end, kStep, [&](int64_t here, const A(&differences)[V]) { f(here, differences, factors); });
    }
  }

 private:
  template <typename F>
  __device__ __forceinline__ void walk_vectors(int64_t at, int64_t end, int64_t step, const F& f) const {
    for (; at + (kUnroll - 1) * step < end; at += kUnroll * step) {
      A differences[kUnroll][V];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load(at + u * step, differences[u]);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) f(at + u * step, differences[u]);
    }
    for (; at < end; at += step) {
      A differences[V];
      load(at, differences);
      f(at, differences);
    }
  }

  __device__ __forceinline__ void load(int64_t at, A (&differences)[V]) const {
    const Vector<T, V> t = load_vector<V>(target + at);
#pragma unroll
    for (int k = 0; k < V; ++k) differences[k] = to_acc(t.lane[k]);
    if constexpr (kSource == Source::kAlike) {
#pragma unroll
      for (int part = 0; part < V; part += kSourceVector) {
        const Vector<S, kSourceVector> s = load_vector<kSourceVector>(source + at + part);
#pragma unroll
        for (int k = 0; k < kSourceVector; ++k) differences[part + k] -= static_cast<A>(to_acc(s.lane[k]));
      }
    } else if constexpr (kSource == Source::kExchanged) {
      static_assert(V == 1);
      const auto [rows, columns, unit] = operand.exchange;
      const int64_t cell = divide(at, unit), all_rows = divide(cell, columns);
      const int64_t column = cell - all_rows * columns, row = all_rows - divide(all_rows, rows) * rows;
      const int64_t other_cell = cell - row * columns - column + column * rows + row;
      differences[0] -= static_cast<A>(to_acc(source[other_cell * unit + at - cell * unit]));
    }
  }
};

// f(Worker, first element, last) with vectors as far as they go, then element by element.
template <typename T, typename S, Source kSource, bool kWeights, typename F>
__device__ __forceinline__ void split(const Operand& operand, int64_t begin, int64_t end, const F& f) {
  constexpr int V = 16 / sizeof(T);
  int64_t middle = begin;
  if (operand.vectors) {
    middle = end - (end - begin) % V;
    f(Worker<T, S, kSource, kWeights, V>(operand), begin, middle);
  }
  if (middle < end) f(Worker<T, S, kSource, kWeights, 1>(operand), middle, end);
}

// f(Worker, first element, last) for [begin, end) of the operand, with the dtypes that it has.
template <typename F>
__device__ __forceinline__ void with_workers(const Operand& operand, int64_t begin, int64_t end, const F& f) {
  const bool weights = operand.weight != nullptr;
  const FloatType type = static_cast<FloatType>(operand.type);
  if (operand.source == nullptr) {
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      if (weights) split<T, T, Source::kNone, true>(operand, begin, end, f);
      else split<T, T, Source::kNone, false>(operand, begin, end, f);
    });
    return;
  }
  with_pair<__half, __nv_bfloat16>(type, static_cast<FloatType>(operand.source_type), [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    if (operand.exchange.rows != 0) f(Worker<T, S, Source::kExchanged, true, 1>(operand), begin, end);
    else if (weights) split<T, S, Source::kAlike, true>(operand, begin, end, f);
    else split<T, S, Source::kAlike, false>(operand, begin, end, f);
  });
}

template <typename Worker>
using worker_t = std::remove_cv_t<std::remove_reference_t<Worker>>;

// This thread's share of the sum over [begin, end).
__device__ __forceinline__ double sum_chunk(const Operand& operand, int64_t begin, int64_t end) {
  double sum = 0;
  with_workers(operand, begin, end, [&](const auto& worker, int64_t first, int64_t last) {
    using W = worker_t<decltype(worker)>;
    typename W::A lanes[W::kVector] = {};
    worker.walk(first, last, [&](int64_t, const auto& differences, const auto& weights) {
#pragma unroll
      for (int k = 0; k < W::kVector; ++k) lanes[k] += differences[k] * differences[k] * weights[k];
    });
#pragma unroll
    for (int k = 0; k < W::kVector; ++k) sum += static_cast<double>(lanes[k]);
  });
  return sum;
}

// This thread's share of the gradient there.
__device__ __forceinline__ void write_chunk(const Operand& operand, int64_t begin, int64_t end, double factor) {
  with_workers(operand, begin, end, [&](const auto& worker, int64_t first, int64_t last) {
    using W = worker_t<decltype(worker)>;
    using T = typename W::Element;
    T* gradient = static_cast<T*>(operand.gradient);
    worker.walk(first, last, [&](int64_t at, const auto& differences, const auto& weights) {
      Vector<T, W::kVector> values;
#pragma unroll
      for (int k = 0; k < W::kVector; ++k)
        values.lane[k] = from_acc<T>(differences[k] * static_cast<typename W::A>(factor) * weights[k]);
      store_vector(gradient + at, values);
    });
  });
}

}  // namespace talib_fast::squared_distance
