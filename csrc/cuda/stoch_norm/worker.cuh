// What one thread does in both passes over a group, in either schedule.
#pragma once

#include "geometry.cuh"
#include "operation.cuh"

namespace talib_fast::stoch_norm {

// One thread's part in its block's work on a group. A vector has V elements; with kRows each has constants of its own.
template <typename Op, int V, bool kRows>
struct Worker {
  using T = typename Op::Element;
  using A = typename Op::A;
  using Sums = typename Op::Sums;
  using K = typename Op::K;
  static constexpr int kTensors = Op::kTensors;
  static constexpr int kChannels = kRows ? V : 1;  // per vector
  // Whether the first pass needs constants. The backward pass needs centers. Runs need to know whether their channel is
  // on running statistics and may be written; in rows one channel of a group nearly always takes the batch's.
  static constexpr bool kFirstPassNeedsConstants = kTensors == 2 || !kRows;
  // Vectors that are loaded ahead in the two passes, as many as registers allow. Constants for each element take many
  // registers, and so does what follows the norm.
  static constexpr bool kFew = sizeof(T) == 8 || (kRows && V > 1 && kTensors == 2);
  static constexpr int kSecondAhead = kFew ? 2 : Op::kFused ? (V == 1 ? 4 : 3) : (V == 1 ? 8 : 4);
  static constexpr int kFirstAhead = kTensors == 1 && kSecondAhead == 3 ? 4 : kSecondAhead;

  struct Values {
    Packed<T, V> x, beside;  // dy, or dz in its place; the residual
    unsigned signs;          // the word that has the vector's
  };

  const Op& op;
  const Geometry& g;
  K* constants;           // [group_channels] shared
  Operands<A>* operands;  // [group_channels] shared
  Sums* sums;             // [sum_entries] shared
  int column, lane_row;
  int64_t group = 0;

  __device__ __forceinline__ Worker(const Op& op, const Geometry& g, unsigned char* shared)
      : op(op),
        g(g),
        constants(reinterpret_cast<K*>(shared)),
        operands(reinterpret_cast<Operands<A>*>(constants + g.group_channels)),
        sums(reinterpret_cast<Sums*>(operands + g.group_channels)),
        column(kRows ? threadIdx.x % g.columns : 0),
        lane_row(kRows ? threadIdx.x / g.columns : threadIdx.x) {}

  // Sums in shared memory: one for each channel and warp or, where a vector has elements of two channels, two for each
  // thread.
  static __host__ __device__ int sum_entries(const Geometry& g, int threads) {
    return kRows && g.run > 1 ? 2 * threads : threads / kWarp * g.group_channels;
  }
  static size_t scratch_bytes(const Geometry& g, int threads) {
    // counts the larger constants, so that what follows the norm changes neither the schedule nor the sums
    const size_t channel = sizeof(Operands<A>) + sizeof(ActivatedConstants<A>);
    return (g.group_channels * channel + sum_entries(g, threads) * sizeof(Sums) + 15) / 16 * 16;
  }

  __device__ __forceinline__ int64_t first_element() const { return group * g.group_channels * g.run + column * V; }
  __device__ __forceinline__ int64_t channel(int i) const { return group * g.group_channels + i; }
  __device__ __forceinline__ bool is_channel(int i) const { return i < g.group_channels && channel(i) < g.channels; }
  __device__ __forceinline__ bool has_column() const {
    return !kRows || (lane_row < g.lane_rows && first_element() < g.row);
  }

  // In rows of runs: the channel, within the group, of a vector's first lane, and how many lanes are of it.
  __device__ __forceinline__ int first_channel() const { return column * V / static_cast<int>(g.run); }
  __device__ __forceinline__ int split() const { return (first_channel() + 1) * static_cast<int>(g.run) - column * V; }

  // The channel of a group whose operands this thread fetches, if the group has so many. The last threads fetch,
  // because the first warp waits for counters.
  __device__ __forceinline__ int fetched_channel() const { return static_cast<int>(blockDim.x - 1 - threadIdx.x); }

  // Brings the operands of a group's channels to shared memory. Other threads may read them after a barrier.
  __device__ __forceinline__ void fetch(int64_t from_group) const {
    const int i = fetched_channel();
    const int64_t c = from_group * g.group_channels + i;
    if (i < g.group_channels && c < g.channels) operands[i] = op.fetch(c);
  }

  // Shares the constants that do not depend on the sums. A barrier has to follow.
  __device__ __forceinline__ void share_initial_constants() const {
    const int i = fetched_channel();
    if (is_channel(i)) constants[i] = op.initial_constants(operands[i]);
  }

  // The constants of the thread's elements, from the group's.
  __device__ __forceinline__ void read_constants(const K* from, K (&constant)[kChannels]) const {
    if (!has_column()) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) constant[k] = K{};
    } else if (!kRows || g.run == 1) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) constant[k] = from[column * kChannels + k];
    } else {
      const int first = first_channel(), lanes = split();
#pragma unroll
      for (int k = 0; k < kChannels; ++k) constant[k] = from[k < lanes ? first : first + 1];
    }
  }

  __device__ __forceinline__ void load_residual(int64_t at, Values& values) const {
    if constexpr (Op::kFused)
      if (op.residual != nullptr) values.beside = load_packed<V>(op.residual + at);
  }

  // Calls take(at, values, step, true) for the thread's vectors among `count` steps from `begin` on. load(at, step)
  // gives the values, a few vectors ahead. Where lanes join their signs, all lanes of a warp take part: for a lane
  // without a vector take gets false, and no values.
  template <int kAhead, typename Load, typename Take>
  __device__ __forceinline__ void for_each_vector(int64_t begin, int count, const Load& load, const Take& take) const {
    const bool has = has_column();
    if (!Op::kWritesSigns && !has) return;
    const int rows = g.lane_rows;
    int behind = 0;  // how many rows behind the warp's first lane
    if constexpr (Op::kWritesSigns && kRows) behind = lane_row - __shfl_sync(0xffffffffu, lane_row, 0);
    if constexpr (Op::kWritesSigns && !kRows) behind = threadIdx.x % kWarp;
    const int own_count = Op::kWritesSigns && !has ? 0 : count;
    int64_t at, step_in_run = 0;
    if constexpr (kRows) {
      at = first_element() + (begin + lane_row) * g.row;
    } else {
      const int64_t first = begin + lane_row, run = divide(first, g.inner_steps);
      step_in_run = first - run * g.inner_steps;
      at = group * g.run + run * g.row + step_in_run * V;
    }
    int step = 0;
    for (int i = lane_row; i - behind < count; i += kAhead * rows, step += kAhead) {
      int64_t places[kAhead];
      Values values[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        places[u] = at;
        at += g.jump;
        if constexpr (!kRows) {
          step_in_run += g.jump_in_run;
          if (step_in_run >= g.inner_steps) step_in_run -= g.inner_steps, at += g.wrap;
        }
        if (i + u * rows < own_count) values[u] = load(places[u], step + u);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (i - behind + u * rows < count) take(places[u], values[u], step + u, i + u * rows < own_count);
    }
  }

  static __device__ __forceinline__ void unpack_to(const Packed<T, V>& packed, A (&values)[V]) {
    const Vector<T, V> vector = unpack<T, V>(packed);
    for_each_lane<V>([&](int lane) { values[lane] = to_acc(vector.lane[lane]); });
  }

  // Backward: dz in the accumulation dtype, which without an activation is dy.
  __device__ __forceinline__ void gradient(const Values& values, const K (&constant)[kChannels], A (&dz)[V]) const {
    if constexpr (kTensors == 2) unpack_to(values.beside, dz);
    if constexpr (kTensors == 2 && Op::kFused) {
      if (op.signs != nullptr) return;  // it is dz
      A z[V], x[V];
      unpack_to(values.x, x);
      for_each_lane<V>([&](int lane) {
        const K& k = constant[kRows ? lane : 0];
        z[lane] = fma(x[lane] - k.center, k.scale, k.shift);
      });
      op.activated.differentiate(z, dz);
    }
  }

  // Backward, first pass: makes dz of dy by the signs, and stores it.
  __device__ __forceinline__ void apply_signs(int64_t at, Values& values) const {
    const unsigned signs = values.signs >> sign_bit(at);
    Vector<T, V> dz = unpack<T, V>(values.beside);
    for_each_lane<V>([&](int lane) {
      if (!(signs >> lane & 1)) dz.lane[lane] = from_acc<T>(op.activated.times_slope(to_acc(dz.lane[lane])));
    });
    store_vector(op.dz + at, dz);
    values.beside = pack(dz);
  }

  // Joins the signs of neighbouring lanes to words; the first lane of a word stores it. All lanes of a warp have to
  // call it.
  __device__ __forceinline__ void store_signs(int64_t at, unsigned signs, bool active) const {
    constexpr int kLanes = kSignsPerWord / V;  // whose signs fill a word
    const int lane = threadIdx.x % kWarp;
    unsigned word = active ? signs << sign_bit(at) : 0;
    const unsigned index = active ? static_cast<unsigned>(sign_word(at)) : ~0u;
    bool is_first = lane % kLanes == 0;
    if (!g.whole_words) is_first = __shfl_up_sync(0xffffffffu, index, 1) != index || lane == 0;
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const unsigned other = __shfl_down_sync(0xffffffffu, word, distance);
      bool same = true;  // as the first lane's, the only one that stores
      if (!g.whole_words) same = __shfl_down_sync(0xffffffffu, index, distance) == index;
      if (same) word |= other;
    }
    if (!active || !is_first) return;
    if (g.whole_words) op.signs[sign_word(at)] = word;
    else atomicOr(op.signs + sign_word(at), word);
  }

  __device__ __forceinline__ void write(int64_t at, const Values& values, const K (&constant)[kChannels],
                                        bool active) const {
    A dz[V];
    gradient(values, constant, dz);
    write(at, values, dz, constant, active);
  }

  __device__ __forceinline__ void write(int64_t at, const Values& values, const A (&dz)[V],
                                        const K (&constant)[kChannels], bool active) const {
    A value[V], x[V];
    unpack_to(values.x, x);
    if constexpr (kTensors == 1) {
      for_each_lane<V>([&](int lane) {
        const K& k = constant[kRows ? lane : 0];
        value[lane] = fma(x[lane] - k.center, k.slope, k.offset);
      });
      if constexpr (Op::kFused) {
        if (op.residual != nullptr) {
          A residual[V];
          unpack_to(values.beside, residual);
          for_each_lane<V>([&](int lane) { value[lane] += residual[lane]; });
        }
        if (op.signs != nullptr) {
          unsigned signs = 0;
          for_each_lane<V>([&](int lane) { signs |= unsigned(op.activated.derivative_is_one(value[lane])) << lane; });
          store_signs(at, signs, active);
        }
        op.activated.apply(value);
      }
    } else {
      for_each_lane<V>([&](int lane) {
        const K& k = constant[kRows ? lane : 0];
        const A affine = (x[lane] - k.center) * k.slope + k.offset;
        // dx on running statistics does not depend on x, which may be infinite
        value[lane] = dz[lane] * k.scale + (k.slope == 0 ? k.offset : affine);
      });
    }
    Vector<T, V> result;
    for_each_lane<V>([&](int lane) { result.lane[lane] = from_acc<T>(value[lane]); });
    if (active) store_vector(op.out + at, result);
  }

  // The first pass over `count` steps from `begin` on: takes the thread's sums, and writes the output where that does
  // not depend on sums. What is not written yet goes to keep(values, step).
  template <typename Keep>
  __device__ __forceinline__ void sum(int64_t begin, int count, bool uses_running_stats, Sums (&result)[kChannels],
                                      const Keep& keep) const {
    K constant[kChannels];
    if constexpr (kFirstPassNeedsConstants) read_constants(constants, constant);
    A center[kChannels], first[kChannels] = {}, second[kChannels] = {};
#pragma unroll
    for (int k = 0; k < kChannels; ++k) center[k] = kTensors == 2 ? constant[k].center : A(0);
    int vectors = 0;
    const auto load = [&](int64_t at, int) {
      Values values;
      values.x = load_packed<V>(op.x + at);
      if constexpr (kTensors == 2) values.beside = load_packed<V>(op.dy + at);
      if constexpr (kTensors == 2 && Op::kFused)
        if (op.signs != nullptr) values.signs = op.signs[sign_word(at)];
      return values;
    };
    const auto add = [&](const Values& values, const A(&dz)[V]) {
      A x[V];
      unpack_to(values.x, x);
      if constexpr (kTensors == 1) {  // squares are taken of differences to the thread's first value
        if (vectors == 0) {
#pragma unroll
          for (int k = 0; k < kChannels; ++k) center[k] = x[k];
        }
      }
      ++vectors;
      for_each_lane<V>([&](int lane) {
        const int k = kRows ? lane : 0;
        const A difference = x[lane] - center[k];
        const A term = kTensors == 1 ? difference : dz[lane];
        first[k] += term;
        second[k] += term * difference;
      });
    };
    for_each_vector<kFirstAhead>(begin, count, load, [&](int64_t at, Values& values, int step, bool active) {
      if constexpr (Op::kFused && kTensors == 2)
        if (op.signs != nullptr) apply_signs(at, values);
      A dz[V];
      gradient(values, constant, dz);
      if (active) add(values, dz);
      if constexpr (!kRows) {
        if (uses_running_stats) {
          if constexpr (kTensors == 1)  // a residual is not loaded ahead: that would take too many registers
            if (active) load_residual(at, values);
          write(at, values, dz, constant, active);
          return;
        }
      }
      if (active) keep(values, step);
    });
    if constexpr (kTensors == 1) {
      const A values = static_cast<A>(vectors) * (V / kChannels), share = vectors == 0 ? A(0) : A(1) / values;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const A shifted = first[k] * share, squares = second[k] - shifted * first[k];
        result[k] = {values, center[k] + shifted, squares < 0 ? A(0) : squares};
      }
    } else {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) result[k] = {first[k], second[k]};
    }
  }

  // The second pass over the same steps.
  template <typename Load>
  __device__ __forceinline__ void write_all(int64_t begin, int count, const Load& load,
                                            const K (&constant)[kChannels]) const {
    for_each_vector<kSecondAhead>(begin, count, load, [&](int64_t at, const Values& values, int, bool active) {
      write(at, values, constant, active);
    });
  }

  // Merges the entries of every channel i of the group in shared memory: `add` merges a lane's share, then neighbouring
  // lanes merge theirs. One thread gets take(i, sums).
  template <typename Add, typename Take>
  __device__ __forceinline__ void merge_entries(const Add& add, const Take& take) const {
    const int lanes = 1 << g.log_lanes, lane = threadIdx.x % lanes, own = threadIdx.x >> g.log_lanes;
    for (int first = 0; first < g.group_channels; first += blockDim.x >> g.log_lanes) {
      const int i = first + own;
      Sums total{};
      if (i < g.group_channels) add(total, i, lane, lanes);
      for (int distance = lanes / 2; distance > 0; distance /= 2) total.merge(total.from_lane(distance));
      if (lane == 0 && is_channel(i)) take(i, total);
    }
  }

  // The same with `rows` entries a channel, [rows, group_channels].
  template <typename Take>
  __device__ __forceinline__ void merge_rows(int rows, const Take& take) const {
    __syncthreads();
    merge_entries(
        [&](Sums& total, int i, int lane, int lanes) {
          for (int r = lane; r < rows; r += lanes) total.merge(sums[r * g.group_channels + i]);
        },
        take);
  }

  // Reduces the threads' sums: one thread gets take(i, sums) for every channel i of the group. It contains a barrier.
  template <typename Take>
  __device__ __forceinline__ void reduce(Sums (&thread_sums)[kChannels], const Take& take) const {
    if (!kRows || g.run == 1) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        for (int distance = kWarp / 2; distance >= g.columns; distance /= 2)
          thread_sums[k].merge(thread_sums[k].from_lane(distance));
      const int lane = threadIdx.x % kWarp;
      if (lane < g.columns) {
#pragma unroll
        for (int k = 0; k < kChannels; ++k)
          sums[threadIdx.x / kWarp * g.group_channels + lane * kChannels + k] = thread_sums[k];
      }
      merge_rows(blockDim.x / kWarp, take);
    } else {  // a warp does not hold whole rows: a channel's entries are those of its columns in all rows
      Sums::join(thread_sums, split(), sums[2 * threadIdx.x], sums[2 * threadIdx.x + 1]);
      __syncthreads();
      const int run = static_cast<int>(g.run);
      merge_entries(
          [&](Sums& total, int i, int lane, int lanes) {
            const int first = i * run / V, columns = ((i + 1) * run - 1) / V - first + 1;
            for (int e = lane; e < columns * g.lane_rows; e += lanes) {
              const int row = e / columns, from = first + e - row * columns;
              total.merge(sums[2 * (row * g.columns + from) + (from * V < i * run)]);
            }
          },
          take);
    }
  }

  // The same for `count` partial sums, [group_channels] each, in global memory.
  template <typename Take>
  __device__ __forceinline__ void merge(const Sums* partial, unsigned count, const Take& take) const {
    constexpr int kAhead = 4;
    const unsigned i = threadIdx.x & (g.group_channels - 1), row = threadIdx.x >> g.log_channels;
    const unsigned rows = blockDim.x >> g.log_channels;
    Sums mine{};
    for (unsigned from = row; row < rows && from < count; from += kAhead * rows) {
      Sums ahead[kAhead] = {};
#pragma unroll
      for (unsigned u = 0; u < kAhead; ++u)
        if (from + u * rows < count) ahead[u] = partial[uint64_t(from + u * rows) * g.group_channels + i];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) mine.merge(ahead[u]);
    }
    for (int distance = kWarp / 2; distance >= g.group_channels; distance /= 2) mine.merge(mine.from_lane(distance));
    const bool wide = g.group_channels >= kWarp;  // then no two lanes of a warp are of one channel
    const int lane = threadIdx.x % kWarp;
    if (wide ? row < rows : lane < g.group_channels)
      sums[(wide ? row : threadIdx.x / kWarp) * g.group_channels + i] = mine;
    merge_rows(wide ? rows : blockDim.x / kWarp, take);
  }
};

}  // namespace talib_fast::stoch_norm
