// Half squared distances over a list of tensors on the GPU, and their gradients: one launch for the whole list. The
// list travels in the launch's parameters. Every block takes one chunk of one tensor; the last block of a tensor to
// finish adds up what the tensor's blocks found, and the last one of all what all did. All sums are reduced in an order
// that depends on shapes and launch parameters only: equal input, equal bits.
#pragma once

#include "../types.h"
#include "driver.h"
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
  uint8_t bytes_log2;        // bytes of target and source that an element has, rounded up to a power of two
};

// The operands of one launch. A launch takes 4 KB of parameters, from CUDA 12.1 on 32 KB.
template <int kOperands>
struct List {
  static constexpr int kStretches = 128;

  Operand operands[kOperands];
  int64_t chunk_bytes;  // of target and source that a block takes
  int count;
  // Blocks come in equal stretches; first_operands[i] is the operand of stretch i's first block. A block that looks for
  // its operand reads parameters one after another, at the start of a launch each from memory: so there are few.
  int stretch_log2;
  uint16_t first_operands[kStretches + 1];
};
constexpr int kFewOperands = 40;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kManyOperands = kFewOperands;
#else
constexpr int kManyOperands = 360;
#endif
static_assert(sizeof(Operand) == 88 && sizeof(List<kFewOperands>) < 4000 && sizeof(List<kManyOperands>) < 32600);

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
  // vectors of target that are asked for before one is used
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
  int j;  // of operand j
  int64_t begin, end;
};

// What this block takes. It is returned because a lambda that got it would be too long for nvcc to inline.
template <int kOperands>
__device__ __forceinline__ Chunk find_chunk(const List<kOperands>& list) {
  const unsigned stretch = blockIdx.x >> list.stretch_log2;
  const int j = operand_index(list, list.first_operands[stretch], list.first_operands[stretch + 1] + 1);
  const Operand& operand = list.operands[j];
  const int64_t elements = list.chunk_bytes >> operand.bytes_log2;
  const int64_t begin = (blockIdx.x - operand.first_block) * elements, rest = operand.elements - begin;
  return {j, begin, begin + (rest < elements ? rest : elements)};
}

// What the blocks of the forward pass found, and where the results go.
struct Results {
  double* chunks;        // [blocks of all launches]
  unsigned* arrived;     // [operands of this launch + 1] counters of blocks, the last of all; 0 before and after
  void* total;           // double where wide, else float; null: a later launch completes it
  void* terms;           // [terms], likewise
  int first_term;        // of this launch
  unsigned first_chunk;  // likewise
  bool wide;
};

__device__ __forceinline__ double read(const void* values, bool wide, int i) {
  return wide ? static_cast<const double*>(values)[i] : static_cast<const float*>(values)[i];
}

__device__ __forceinline__ void write(void* values, bool wide, int i, double value) {
  if (wide) static_cast<double*>(values)[i] = value;
  else static_cast<float*>(values)[i] = static_cast<float>(value);
}

// This thread's share of the sum of chunks, and of that of [begin, end) among them. A thread has the same ones and adds
// them up in the same order whether it is asked for all or for those alone. It asks for many before it uses one.
struct Sums {
  double all = 0, own = 0;

  __device__ __forceinline__ void add(const double* chunks, unsigned first, unsigned last, unsigned begin,
                                      unsigned end) {
    constexpr unsigned kLoads = 16;
    for (unsigned at = first / kThreads * kThreads + threadIdx.x; at < last; at += kLoads * kThreads) {
      double loaded[kLoads];
#pragma unroll
      for (unsigned u = 0; u < kLoads; ++u) {
        const unsigned i = at + u * kThreads;
        loaded[u] = first <= i && i < last ? chunks[i] : 0;
      }
#pragma unroll
      for (unsigned u = 0; u < kLoads; ++u) {
        const unsigned i = at + u * kThreads;
        all += loaded[u];
        own += begin <= i && i < end ? loaded[u] : 0;
      }
    }
  }
};

template <int kOperands>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ List<kOperands> list, const Results results) {
  SIMT_SHARED(double, warp_sums, kThreads / kWarp);
  SIMT_SHARED(bool, is_last, 2);

  const auto [j, begin, end] = find_chunk(list);
  const double sum = block_sum<kThreads>(sum_chunk(list.operands[j], begin, end), warp_sums);
  if (threadIdx.x == 0) results.chunks[results.first_chunk + blockIdx.x] = sum;
  __syncthreads();
  // Two warps count at the same time, for either takes long. Which block is last makes no difference to a result, and
  // the last of an operand need not be that of all.
  const unsigned first_own = list.operands[j].first_block;
  const unsigned last_own = j + 1 < list.count ? list.operands[j + 1].first_block : gridDim.x;
  const auto comes_last = [](unsigned* counter, unsigned blocks) {
    return increment_acquire_release(counter, blocks - 1) == blocks - 1;
  };
  if (threadIdx.x == 0) is_last[0] = comes_last(results.arrived + j, last_own - first_own);
  if (threadIdx.x == kWarp)
    is_last[1] = results.total != nullptr && comes_last(results.arrived + list.count, gridDim.x);
  __syncthreads();
  if (!is_last[0] && !is_last[1]) return;

  const unsigned own = results.first_chunk + first_own, own_end = results.first_chunk + last_own;
  Sums sums;
  sums.add(results.chunks, is_last[1] ? 0 : own, is_last[1] ? results.first_chunk + gridDim.x : own_end, own, own_end);
  if (is_last[0]) {
    const double term = block_sum<kThreads>(sums.own, warp_sums);
    if (threadIdx.x == 0) write(results.terms, results.wide, results.first_term + j, term / 2);
    __syncthreads();
  }
  if (is_last[1]) {
    const double total = block_sum<kThreads>(sums.all, warp_sums);
    if (threadIdx.x == 0) write(results.total, results.wide, 0, total / 2);
  }
}

template <int kOperands>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ List<kOperands> list, const void* __restrict__ grad, bool wide_grad) {
  const double factor = read(grad, wide_grad, 0);
  const auto [j, begin, end] = find_chunk(list);
  write_chunk(list.operands[j], begin, end, factor);
}

// ---- Launch

// One launch: operands that lie together, and how they are cut.
struct Launch {
  const Operand* operands;
  int first, count;
  unsigned blocks;
  int64_t chunk_bytes;
};

// How many operands a launch can take.
inline size_t most_operands() { return driver_takes_many_parameters() ? kManyOperands : kFewOperands; }

// The one place that decides how the operands are cut; it gives them their blocks. A block takes so much that the sums
// of all blocks are few, and so little that none is waited for. An empty operand has a block too, for its term.
inline std::vector<Launch> plan(std::vector<Operand>& operands, int multiprocessors) {
  // 64 KB: 256 bytes a thread, some rounds of loads, beside which finding the tensor and summing up the block hardly
  // count. 32 blocks: ten times as many as a multiprocessor has room for, so that what the last ones leave idle is
  // little, and what the last block of all adds up stays a few thousand sums.
  constexpr int64_t kSmallest = 64 << 10, kBlocksPerMultiprocessor = 32;
  int64_t bytes = 0;
  for (const Operand& operand : operands) bytes += operand.elements << operand.bytes_log2;
  const int64_t chunk_bytes =
      kSmallest * std::max<int64_t>(1, ceil_div(bytes, kSmallest * kBlocksPerMultiprocessor * multiprocessors));
  std::vector<Launch> launches;
  const size_t most = most_operands();
  for (size_t first = 0; first < operands.size(); first += most) {
    const size_t count = std::min(most, operands.size() - first);
    unsigned blocks = 0;
    for (size_t j = first; j < first + count; ++j) {
      Operand& operand = operands[j];
      operand.first_block = blocks;
      blocks += std::max(1u, static_cast<unsigned>(ceil_div(operand.elements, chunk_bytes >> operand.bytes_log2)));
    }
    launches.push_back({&operands[first], static_cast<int>(first), static_cast<int>(count), blocks, chunk_bytes});
  }
  return launches;
}

template <int kOperands>
void fill(List<kOperands>& list, const Launch& launch) {
  std::copy_n(launch.operands, launch.count, list.operands);
  list.count = launch.count, list.chunk_bytes = launch.chunk_bytes;
  while ((launch.blocks - 1) >> list.stretch_log2 >= List<kOperands>::kStretches) ++list.stretch_log2;
  int j = 0;
  for (int stretch = 0; stretch <= List<kOperands>::kStretches; ++stretch) {
    const uint64_t block = uint64_t{static_cast<unsigned>(stretch)} << list.stretch_log2;
    while (j + 1 < launch.count && launch.operands[j + 1].first_block <= block) ++j;
    list.first_operands[stretch] = static_cast<uint16_t>(j);
  }
}

// f(the launch's parameters), in a list as short as the operands allow
template <typename F>
void with_list(const Launch& launch, const F& f) {
  const auto with = [&](auto list) {
    fill(list, launch);
    f(list);
  };
  if (launch.count <= kFewOperands) with(List<kFewOperands>{});
  else with(List<kManyOperands>{});
}

inline void launch_forward(const Launch& launch, const Results& results, cudaStream_t stream) {
  with_list(launch, [&](const auto& list) {
    constexpr int kOperands = std::extent_v<decltype(list.operands)>;
    SIMT_LAUNCH((forward_kernel<kOperands>), dim3(launch.blocks), dim3(kThreads), 0, stream, list,
                results);
  });
}

inline void launch_backward(const Launch& launch, const void* grad, bool wide_grad, cudaStream_t stream) {
  with_list(launch, [&](const auto& list) {
    constexpr int kOperands = std::extent_v<decltype(list.operands)>;
    SIMT_LAUNCH((backward_kernel<kOperands>), dim3(launch.blocks), dim3(kThreads), 0, stream, list, grad, wide_grad);
  });
}

}  // namespace talib_fast::squared_distance
