// Half squared distances over a list of tensors on the GPU, and their gradients: one launch for the whole list. The
// list travels in the launch's parameters. Every block takes one chunk of one tensor; the last block to finish adds up
// what all of them found. All sums are reduced in an order that depends on shapes and launch parameters only: equal
// input, equal bits.
#pragma once

#include "../types.h"
#include "runtime.cuh"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace talib_fast::squared_distance {

constexpr int kThreads = 256;

// One tensor of the list, with its source and what belongs to them, dense.
struct Operand {
  const void* target;
  const void* source;        // null: zeros
  const void* weight;        // [channels] of the accumulation dtype; null: ones
  void* gradient;            // null in the forward pass
  int64_t elements;
  int64_t channels, inner;   // element i is of channel i / inner % channels
  Exchange exchange;         // how the source's order in memory differs from the target's
  unsigned first_block;
  uint8_t type;              // FloatType
  uint8_t source_type;       // the source's, which makes a pair with it
  bool vectors;              // all addresses suit vectors of 16 bytes of target
};

// The operands of one launch. A launch takes 4 KB of parameters, from CUDA 12.1 on 32 KB.
template <int kOperands>
struct List {
  Operand operands[kOperands];
  int count;
  unsigned blocks;
  int64_t chunk;  // elements that a block takes
};
constexpr int kFewOperands = 40;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kManyOperands = kFewOperands;
#else
constexpr int kManyOperands = 360;
#endif
static_assert(sizeof(Operand) == 88 && sizeof(List<kFewOperands>) < 3800 && sizeof(List<kManyOperands>) < 32600);

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
  return a / b;
}

// Where in the weights a thread is, which goes from one of its vectors to the next in equal steps.
class WeightWalk {
 public:
  __device__ __forceinline__ WeightWalk(const Operand& operand, int64_t first, int64_t step)
      : channels_(operand.channels), inner_(operand.inner) {
    locate(first, channel_, in_run_);
    locate(step, jump_, jump_in_run_);
  }

  // f(channel) for as many elements from here on as f is called
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
enum class Source { kNone, kAlike, kExchanged };  // the last with weights that may be missing, too

// What one thread does to its share of [begin, end) of an operand. T, S: dtypes of target and source; V elements a
// vector. walk calls f(first element, differences, weights) for every vector.
template <typename T, typename S, Source kSource, bool kWeights, int V>
struct Worker {
  using Element = T;
  using A = acc_t<T>;
  static constexpr int kVector = V;
  // vectors that are asked for before one is used
  static constexpr int kUnroll = V == 8 || kSource == Source::kExchanged ? 2 : 4;
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
__device__ __forceinline__ void with_types(const Operand& operand, int64_t begin, int64_t end, const F& f) {
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
  with_types(operand, begin, end, [&](const auto& worker, int64_t first, int64_t last) {
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
  with_types(operand, begin, end, [&](const auto& worker, int64_t first, int64_t last) {
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

struct Chunk {
  const Operand& operand;
  int64_t begin, end;
};

// What this block takes. It is returned because a lambda that got it would be too long for nvcc to inline.
template <int kOperands>
__device__ __forceinline__ Chunk find_chunk(const List<kOperands>& list) {
  const Operand& operand = find_operand(list);
  const int64_t begin = (blockIdx.x - operand.first_block) * list.chunk;
  const int64_t rest = operand.elements - begin;
  return {operand, begin, begin + (rest < list.chunk ? rest : list.chunk)};
}

// What the blocks of the forward pass found, and where the results go.
struct Results {
  double* chunks;     // [blocks]
  unsigned* arrived;  // 0 before the launch
  void* total;        // double where wide, else float; null: a later launch completes it
  void* terms;        // [terms], likewise
  int first_term;     // of this launch
  bool wide;
};

__device__ __forceinline__ double read(const void* values, bool wide, int i) {
  return wide ? static_cast<const double*>(values)[i] : static_cast<const float*>(values)[i];
}

__device__ __forceinline__ void write(void* values, bool wide, int i, double value) {
  if (wide) static_cast<double*>(values)[i] = value;
  else static_cast<float*>(values)[i] = static_cast<float>(value);
}

template <int kOperands>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ List<kOperands> list, const Results results) {
  constexpr int kWarps = kThreads / kWarp;
  SIMT_SHARED(double, warp_sums, kWarps);
  SIMT_SHARED(unsigned, ticket, 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  if (blockIdx.x < list.blocks) {
    const auto [operand, begin, end] = find_chunk(list);
    const double sum = block_sum<kThreads>(sum_chunk(operand, begin, end), warp_sums);
    if (threadIdx.x == 0) results.chunks[blockIdx.x] = sum;
  }
  if (threadIdx.x == 0) ticket[0] = add_acquire_release(results.arrived, 1);
  __syncthreads();
  if (ticket[0] != gridDim.x - 1) return;  // the last to arrive goes on; which block that is makes no difference

  double sum = 0;  // of the terms that this thread has written
  for (int j = warp; j < list.count; j += kWarps) {
    const unsigned last = j + 1 < list.count ? list.operands[j + 1].first_block : list.blocks;
    double term = 0;
    for (unsigned block = list.operands[j].first_block + lane; block < last; block += kWarp)
      term += results.chunks[block];
    term = warp_sum(term) / 2;
    if (lane == 0) write(results.terms, results.wide, results.first_term + j, term), sum += term;
  }
  if (results.total == nullptr) return;
  for (int j = threadIdx.x; j < results.first_term; j += kThreads) sum += read(results.terms, results.wide, j);
  sum = block_sum<kThreads>(sum, warp_sums);
  if (threadIdx.x == 0) write(results.total, results.wide, 0, sum);
}

template <int kOperands>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ List<kOperands> list, const void* __restrict__ grad, bool wide_grad) {
  const double factor = read(grad, wide_grad, 0);
  const auto [operand, begin, end] = find_chunk(list);
  write_chunk(operand, begin, end, factor);
}

// ---- Launch

// One launch: operands that lie together, and how they are cut.
struct Launch {
  const Operand* operands;
  int first, count;
  unsigned blocks;
  int64_t chunk;
};

// How many operands a launch can take.
inline size_t most_operands() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return driver < 12010 ? kFewOperands : kManyOperands;
}

// The one place that decides how the operands are cut; it gives them their blocks. A block takes so much that the sums
// of all blocks are few, and so little that none is waited for.
inline std::vector<Launch> plan(std::vector<Operand>& operands, int multiprocessors) {
  // 8192: 32 elements a thread, some rounds of loads, beside which finding the tensor and summing up the block hardly
  // count. 32 blocks: four times as many as a multiprocessor has room for, so that what the last ones leave idle is
  // little, and what the last block of all adds up stays a few thousand sums.
  constexpr int64_t kSmallest = 8192, kBlocksPerMultiprocessor = 32;
  int64_t elements = 0;
  for (const Operand& operand : operands) elements += operand.elements;
  const int64_t chunk =
      kSmallest * std::max<int64_t>(1, ceil_div(elements, kSmallest * kBlocksPerMultiprocessor * multiprocessors));
  std::vector<Launch> launches;
  const size_t most = most_operands();
  for (size_t first = 0; first < operands.size(); first += most) {
    const size_t count = std::min(most, operands.size() - first);
    unsigned blocks = 0;
    for (size_t j = first; j < first + count; ++j) {
      operands[j].first_block = blocks;
      blocks += static_cast<unsigned>(ceil_div(operands[j].elements, chunk));
    }
    launches.push_back({&operands[first], static_cast<int>(first), static_cast<int>(count), blocks, chunk});
  }
  return launches;
}

// f(the launch's parameters), in a list as short as the operands allow
template <typename F>
void with_list(const Launch& launch, const F& f) {
  const auto fill = [&](auto list) {
    std::copy_n(launch.operands, launch.count, list.operands);
    list.count = launch.count, list.blocks = launch.blocks, list.chunk = launch.chunk;
    f(list);
  };
  if (launch.count <= kFewOperands) fill(List<kFewOperands>{});
  else fill(List<kManyOperands>{});
}

inline void launch_forward(const Launch& launch, const Results& results, cudaStream_t stream) {
  with_list(launch, [&](const auto& list) {
    constexpr int kOperands = std::extent_v<decltype(list.operands)>;
    SIMT_LAUNCH((forward_kernel<kOperands>), dim3(std::max(launch.blocks, 1u)), dim3(kThreads), 0, stream, list,
                results);
  });
}

inline void launch_backward(const Launch& launch, const void* grad, bool wide_grad, cudaStream_t stream) {
  if (launch.blocks == 0) return;
  with_list(launch, [&](const auto& list) {
    constexpr int kOperands = std::extent_v<decltype(list.operands)>;
    SIMT_LAUNCH((backward_kernel<kOperands>), dim3(launch.blocks), dim3(kThreads), 0, stream, list, grad, wide_grad);
  });
}

}  // namespace talib_fast::squared_distance
