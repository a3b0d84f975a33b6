// Stochastic normalisation on the GPU. Both directions take sums per channel, derive constants from them and write
// with these; a channel on running statistics whose values lie in runs is written while it is summed. Two schedules:
//
// resident: a block takes a group of channels whole, and keeps what it read in shared memory between the passes.
// sliced:   many blocks share a group. They take items off one list, on which the second pass over a group follows
//           its first one so closely that it should read from the L2 cache. One launch, no sync with the host.
//
// What follows the norm, an activation and a residual, is a part of the kernels with kFused, and costs the others
// nothing.
//
// All sums are reduced in an order that depends on shapes and launch parameters only: equal input, equal bits.
#pragma once

#include "../types.h"
#include "runtime.cuh"

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace talib_fast::stoch_norm {

constexpr int kMaxThreads = 512;     // of a block of the resident schedule
constexpr int kSlicedThreads = 256;  // of the sliced one
constexpr int kBlocksPerMultiprocessor = 2;  // likewise; of three, with 80 registers a thread, some would spill

template <int V, typename F>
__device__ __forceinline__ void for_each_lane(const F& f) {
#pragma unroll
  for (int lane = 0; lane < V; ++lane) f(lane);
}

template <typename A>
__device__ __forceinline__ A load(const ChannelVector& vector, int64_t c) {
  const int64_t i = c * vector.stride;
  switch (vector.type) {
    case FloatType::kFloat: return static_cast<A>(static_cast<const float*>(vector.data)[i]);
    case FloatType::kDouble: return static_cast<A>(static_cast<const double*>(vector.data)[i]);
    case FloatType::kHalf: return to_acc(static_cast<const __half*>(vector.data)[i]);
    default: return to_acc(static_cast<const __nv_bfloat16*>(vector.data)[i]);
  }
}

template <typename A>
__device__ __forceinline__ A load_or(const ChannelVector& vector, int64_t c, A absent) {
  return vector.data == nullptr ? absent : load<A>(vector, c);
}

template <typename A>
__device__ __forceinline__ void store(const ChannelVector& vector, int64_t c, A value) {
  const int64_t i = c * vector.stride;
  switch (vector.type) {
    case FloatType::kFloat: static_cast<float*>(vector.data)[i] = static_cast<float>(value); break;
    case FloatType::kDouble: static_cast<double*>(vector.data)[i] = static_cast<double>(value); break;
    case FloatType::kHalf:
      static_cast<__half*>(vector.data)[i] = from_acc<__half>(static_cast<float>(value));
      break;
    default: static_cast<__nv_bfloat16*>(vector.data)[i] = from_acc<__nv_bfloat16>(static_cast<float>(value));
  }
}

// An element's sign is this bit of this word. Unsigned, so that they are a mask and a shift.
__device__ __forceinline__ unsigned sign_bit(int64_t at) { return static_cast<unsigned>(at) % kSignsPerWord; }
__device__ __forceinline__ uint64_t sign_word(int64_t at) { return static_cast<uint64_t>(at) / kSignsPerWord; }

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + exp(-z)); }
__device__ __forceinline__ double sigmoid(double z) { return 1 / (1 + exp(-z)); }

// The distribution function of the standard normal distribution.
template <typename A>
__device__ __forceinline__ A normal(A z) {
  return A(0.5) * (1 + erf(z * A(0.70710678118654752)));
}

// What is done to norm(x) + residual, z. A switch that is the same for all threads stands outside the loops.
template <typename A>
struct Activated {
  Activation activation;
  A slope, limit;  // of the piecewise ones: a line below 0, and constant from the limit on (NaN: there is none)

  __device__ __forceinline__ bool derivative_is_one(A z) const { return !(z <= 0) && !(z >= limit); }

  // An infinite one, cut off, is 0.
  __device__ __forceinline__ A times_slope(A value) const { return slope == 0 ? A(0) : slope * value; }

  template <int V>
  __device__ __forceinline__ void apply(A (&z)[V]) const {
    switch (activation) {
      case Activation::kSilu: return for_each_lane<V>([&](int i) { z[i] *= sigmoid(z[i]); });
      case Activation::kHardswish:
        return for_each_lane<V>([&](int i) { z[i] = z[i] * fmin(fmax(z[i] + 3, A(0)), A(6)) * A(1.0 / 6); });
      case Activation::kGelu: return for_each_lane<V>([&](int i) { z[i] *= normal(z[i]); });
      default:
        for_each_lane<V>([&](int i) { z[i] = z[i] < 0 ? times_slope(z[i]) : z[i] > limit ? limit : z[i]; });
    }
  }

  // Multiplies dy by the derivative at z.
  template <int V>
  __device__ __forceinline__ void differentiate(const A (&z)[V], A (&dy)[V]) const {
    switch (activation) {
      case Activation::kSilu:
        return for_each_lane<V>([&](int i) {
          const A s = sigmoid(z[i]);
          dy[i] *= s * (1 + z[i] * (1 - s));
        });
      case Activation::kHardswish:
        return for_each_lane<V>([&](int i) {
          dy[i] = z[i] <= -3 ? A(0) : z[i] < 3 ? dy[i] * (z[i] * A(1.0 / 3) + A(0.5)) : dy[i];
        });
      case Activation::kGelu:
        return for_each_lane<V>([&](int i) {
          dy[i] *= normal(z[i]) + z[i] * (A(0.39894228040143268) * exp(A(-0.5) * z[i] * z[i]));
        });
      default:
        for_each_lane<V>([&](int i) { dy[i] = derivative_is_one(z[i]) ? dy[i] : times_slope(dy[i]); });
    }
  }
};

// y = (x - center) * slope + offset        dx = dy * scale + (x - center) * slope + offset
template <typename A>
struct alignas(16) Constants {
  A center, slope, offset, scale;
};

// And z = (x - center) * scale + shift, bit for bit what the forward pass made y of.
template <typename A>
struct ActivatedConstants : Constants<A> {
  A shift;
};

// What an operation reads of a channel but its values.
template <typename A>
struct Operands {
  bool batch;      // whether the channel takes the batch's statistics
  A mean, spread;  // the running mean and variance; in the backward pass the mean and 1 / standard deviation used
  A weight, bias;
};

// Count, mean and sum of squared deviations from it.
template <typename A>
struct Moments {
  A count, mean, squares;

  // Equal counts, which nearly all are, take no division.
  __device__ __forceinline__ void merge(const Moments& other) {
    const A sum = count + other.count, difference = other.mean - mean;
    if (sum == 0) return;
    const A share = count == other.count ? A(0.5) : other.count / sum;
    mean += difference * share;
    // in this order: beside a mean of 1e20 those of no values at all give 0, where its square would give inf * 0
    squares += other.squares + difference * (count * share) * difference;
    count = sum;
  }
  // Of lanes with equal counts: of those before `split`, and of the rest.
  template <int V>
  __device__ __forceinline__ static void join(const Moments (&lanes)[V], int split, Moments& before, Moments& after) {
    const A count = lanes[0].count;
    const int rest = V > split ? V - split : 0;
    const A share = A(1) / static_cast<A>(V - rest), rest_share = rest > 0 ? A(1) / static_cast<A>(rest) : A(0);
    before = {count * static_cast<A>(V - rest), lanes[0].mean, 0};
    after = {count * static_cast<A>(rest), lanes[V - 1].mean, 0};
    for_each_lane<V>([&](int k) {
      if (k < split) before.mean += (lanes[k].mean - lanes[0].mean) * share;
      else after.mean += (lanes[k].mean - lanes[V - 1].mean) * rest_share;
    });
    for_each_lane<V>([&](int k) {
      Moments& joined = k < split ? before : after;
      const A difference = lanes[k].mean - joined.mean;
      joined.squares += lanes[k].squares + difference * count * difference;
    });
  }
  __device__ __forceinline__ Moments from_lane(int distance) const {
    return {__shfl_xor_sync(0xffffffffu, count, distance), __shfl_xor_sync(0xffffffffu, mean, distance),
            __shfl_xor_sync(0xffffffffu, squares, distance)};
  }
};

// Sum of dy and of dy * (x - mean).
template <typename A>
struct Products {
  A sum, product;

  __device__ __forceinline__ void merge(const Products& other) { sum += other.sum, product += other.product; }
  template <int V>
  __device__ __forceinline__ static void join(const Products (&lanes)[V], int split, Products& before,
                                              Products& after) {
    before = after = {};
    for_each_lane<V>([&](int k) { (k < split ? before : after).merge(lanes[k]); });
  }
  __device__ __forceinline__ Products from_lane(int distance) const {
    return {__shfl_xor_sync(0xffffffffu, sum, distance), __shfl_xor_sync(0xffffffffu, product, distance)};
  }
};

template <typename T, bool kIsFused>
struct Forward {
  using Element = T;
  using A = acc_t<T>;
  using Sums = Moments<A>;
  using K = Constants<A>;
  static constexpr bool kFused = kIsFused;
  static constexpr int kTensors = 1;  // that both passes read
  static constexpr bool kWritesSigns = kFused;

  const T* __restrict__ x;         // [outer, channels, inner]
  const T* __restrict__ residual;  // [outer, channels, inner]; null: none
  T* __restrict__ out;             // [outer, channels, inner]
  unsigned* signs;                 // [elements / 32, rounded up]; null: not to be kept
  A* __restrict__ mean;      // [channels]
  A* __restrict__ invstd;    // [channels]
  ChannelMask mask;
  ChannelVector weight, bias, running_mean, running_var;
  ChannelVector moved_mean, moved_var;  // the running statistics again, or where their moved values go instead
  int64_t* __restrict__ batches;  // null: not to be counted
  A momentum, eps;
  int64_t count;  // values per channel
  Activated<A> activated;

  __device__ __forceinline__ Operands<A> fetch(int64_t c) const {
    const A mean = load<A>(running_mean, c), var = load<A>(running_var, c);
    return {mask(c), mean, var, load_or<A>(weight, c, 1), load_or<A>(bias, c, 0)};
  }

  // All the way to the batch's where the momentum is 1, whatever the old one is.
  __device__ __forceinline__ A moved(A running, A batch) const {
    return momentum == 1 ? batch : running + momentum * (batch - running);
  }

  // The constants of a channel on running statistics.
  __device__ __forceinline__ Constants<A> known(const Operands<A>& channel) const {
    return {channel.mean, A(1) / sqrt(channel.spread + eps) * channel.weight, channel.bias, 0};
  }

  __device__ __forceinline__ Constants<A> finish(int64_t c, const Operands<A>& channel, const Sums& sums) const {
    const bool batch = channel.batch && count > 0;
    const A used_mean = batch ? sums.mean : channel.mean;
    const A used_invstd = A(1) / sqrt((batch ? sums.squares / static_cast<A>(count) : channel.spread) + eps);
    mean[c] = used_mean, invstd[c] = used_invstd;
    if (count > 0) {
      const A unbiased = sums.squares / static_cast<A>(count > 1 ? count - 1 : 1);
      store(moved_mean, c, moved(channel.mean, sums.mean));
      store(moved_var, c, moved(channel.spread, unbiased));
      if (c == 0 && batches != nullptr) ++*batches;
    } else if (moved_mean.data != running_mean.data) {  // in place they stay as they are: A may be too narrow for them
      store(moved_mean, c, channel.mean), store(moved_var, c, channel.spread);
    }
    return {used_mean, used_invstd * channel.weight, channel.bias, 0};
  }
};

template <typename T, bool kIsFused>
struct Backward {
  using Element = T;
  using A = acc_t<T>;
  using Sums = Products<A>;
  using K = std::conditional_t<kIsFused, ActivatedConstants<A>, Constants<A>>;
  static constexpr bool kFused = kIsFused;
  static constexpr int kTensors = 2;
  static constexpr bool kWritesSigns = false;

  const T* __restrict__ x;             // [outer, channels, inner]
  const T* __restrict__ dy;            // [outer, channels, inner]
  T* __restrict__ out;                 // [outer, channels, inner]
  const unsigned* __restrict__ signs;  // [elements / 32, rounded up]; null: z is calculated once more
  T* dz;                               // [outer, channels, inner]; with signs: from the first pass for the second one
  const A* __restrict__ mean;          // [channels]
  const A* __restrict__ invstd;        // [channels]
  ChannelMask mask;
  ChannelVector weight, bias;
  A* __restrict__ dweight;  // [channels]
  A* __restrict__ dbias;    // [channels]
  int64_t count;            // values per channel
  Activated<A> activated;

  // Which of the two the second pass reads.
  __device__ __forceinline__ const T* gradient() const {
    if constexpr (kFused)
      if (signs != nullptr) return dz;
    return dy;
  }

  __device__ __forceinline__ Operands<A> fetch(int64_t c) const {
    return {mask(c), mean[c], invstd[c], load_or<A>(weight, c, 1), kFused ? load_or<A>(bias, c, 0) : A(0)};
  }

  // The constants of a channel on running statistics; those of z and its center are wanted in any case.
  __device__ __forceinline__ K known(const Operands<A>& channel) const {
    const Constants<A> constants{channel.mean, 0, 0, channel.spread * channel.weight};
    if constexpr (kFused) return {constants, channel.bias};
    else return constants;
  }

  __device__ __forceinline__ K finish(int64_t c, const Operands<A>& channel, const Sums& sums) const {
    K constants = known(channel);
    const A dgamma = count > 0 ? sums.product * channel.spread : A(0);  // which may be infinite
    dbias[c] = sums.sum, dweight[c] = dgamma;
    if (channel.batch && count > 0) {
      const A share = -constants.scale / static_cast<A>(count);
      constants.slope = share * dgamma * channel.spread, constants.offset = share * sums.sum;
    }
    return constants;
  }
};

// How a tensor [outer, channels, inner] is cut. A group of channels is what a block takes whole, or blocks share:
//
// runs: one channel, whose elements lie in runs of `inner`. All of a vector are of that channel.
// rows: as many neighbouring channels as fill vectors: in channels_last (inner = 1) those of some 128 bytes, elsewhere
//       those until a run ends where a vector does, as 8 channels of 7 × 7. Their elements are rows, one after another
//       in memory, and a vector's are of several channels: in channels_last all of others, elsewhere of two at most.
//
// In rows a block's threads form columns, a vector wide, and go down the rows. A column's vectors are its steps.
struct Geometry {
  int64_t channels, run;              // run: inner
  int64_t row;                        // elements from a run to the channel's next one, and from a row to the next
  int64_t steps, slice_steps;         // of a column; in a slice
  unsigned groups, slices;            // slices: of a group
  unsigned sections, section_slices;  // many slices are merged by sections, so that no block has all of them to merge
  int group_channels, log_channels;   // a power of two, and which
  int columns, lane_rows;             // of a block's threads: columns × rows
  int log_lanes;                      // so many neighbouring lanes merge a channel's sums, likewise
  int scratch_bytes;                  // of shared memory, beside what is kept
  bool whole_words;                   // of signs: a word's elements are written by one warp at a time
  // in runs a thread's way from one of its vectors to the next, a block's threads on; in rows jump alone:
  int64_t inner_steps;        // vectors in a run
  int64_t jump, jump_in_run;  // elements; vectors within the run
  int64_t wrap;               // elements on top if that leads past the end of the run
};

// What one thread knows of its block's work on a group. V elements a vector; kRows: each with constants of its own.
template <typename Op, int V, bool kRows>
struct Worker {
  using T = typename Op::Element;
  using A = typename Op::A;
  using Sums = typename Op::Sums;
  using K = typename Op::K;
  static constexpr int kTensors = Op::kTensors;
  static constexpr int kChannels = kRows ? V : 1;  // per vector
  // What the first pass needs of the channels: the backward pass centers, and runs whether they are known and may be
  // written. Of a group in rows one channel nearly always takes the batch's statistics.
  static constexpr bool kFirstPassNeedsConstants = kTensors == 2 || !kRows;
  // Vectors asked for ahead in the two passes, as many as registers allow: elements that have constants of their own
  // take most, and so does what follows the norm.
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

  // Sums in shared memory: a channel's of every warp, or where lanes are of two channels both of every thread.
  static __host__ __device__ int sum_entries(const Geometry& g, int threads) {
    return kRows && g.run > 1 ? 2 * threads : threads / kWarp * g.group_channels;
  }
  static size_t scratch_bytes(const Geometry& g, int threads) {
    // with the larger constants, so that what follows the norm does not change the schedule, and with it the sums
    const size_t channel = sizeof(Operands<A>) + sizeof(ActivatedConstants<A>);
    return (g.group_channels * channel + sum_entries(g, threads) * sizeof(Sums) + 15) / 16 * 16;
  }

  __device__ __forceinline__ int64_t first_element() const { return group * g.group_channels * g.run + column * V; }
  __device__ __forceinline__ int64_t channel(int i) const { return group * g.group_channels + i; }
  __device__ __forceinline__ bool is_channel(int i) const { return i < g.group_channels && channel(i) < g.channels; }
  __device__ __forceinline__ bool has_column() const {
    return !kRows || (lane_row < g.lane_rows && first_element() < g.row);
  }

  // Rows of runs: the channel in the group of a vector's first lane, and how many lanes are of it.
  __device__ __forceinline__ int first_channel() const { return column * V / static_cast<int>(g.run); }
  __device__ __forceinline__ int split() const { return (first_channel() + 1) * static_cast<int>(g.run) - column * V; }

  // The channel of a group that a thread fetches operands of, if it is one: the last threads do, for the first one's
  // warp waits for counters.
  __device__ __forceinline__ int fetched_channel() const { return static_cast<int>(blockDim.x - 1 - threadIdx.x); }

  // Brings the operands of a group's channels to shared memory. A barrier has to follow, but not for the thread that
  // fetches a channel's.
  __device__ __forceinline__ void fetch(int64_t from_group) const {
    const int i = fetched_channel();
    const int64_t c = from_group * g.group_channels + i;
    if (i < g.group_channels && c < g.channels) operands[i] = op.fetch(c);
  }

  // Shares the constants that do not depend on the sums. A barrier has to follow.
  __device__ __forceinline__ void share_known_constants() const {
    const int i = fetched_channel();
    if (is_channel(i)) constants[i] = op.known(operands[i]);
  }

  // Those of the thread's elements, from the group's.
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

  // Calls take(at, values, step, true) for the thread's vectors among `count` steps from `begin` on, a few loads ahead,
  // with values of load(at, step). Where lanes join their signs, all of a warp take part: those without a vector there
  // get false, and no values.
  template <int kAhead, typename Load, typename Take>
  __device__ __forceinline__ void for_each_vector(int64_t begin, int count, const Load& load, const Take& take) const {
    const bool has = has_column();
    if (!Op::kWritesSigns && !has) return;
    const int rows = g.lane_rows;
    int behind = 0;  // the warp's first lane, in rows
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

  // Of the backward pass: dy in the type to calculate in, or dz in its place.
  __device__ __forceinline__ void gradient(const Values& values, const K (&constant)[kChannels], A (&dz)[V]) const {
    if constexpr (kTensors == 2)
      unpack_to(values.beside, dz);
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

  // The first pass makes dz of dy, where signs say how.
  __device__ __forceinline__ void apply_signs(int64_t at, Values& values) const {
    const unsigned signs = values.signs >> sign_bit(at);
    Vector<T, V> dz = unpack<T, V>(values.beside);
    for_each_lane<V>([&](int lane) {
      if (!(signs >> lane & 1)) dz.lane[lane] = from_acc<T>(op.activated.times_slope(to_acc(dz.lane[lane])));
    });
    store_vector(op.dz + at, dz);
    values.beside = pack(dz);
  }

  // Joins the signs of neighbouring lanes to words; the first lane of each stores it. All of the warp have to be here.
  __device__ __forceinline__ void store_signs(int64_t at, unsigned signs, bool active) const {
    constexpr int kLanes = kSignsPerWord / V;  // whose signs fill a word
    const int lane = threadIdx.x % kWarp;
    unsigned word = active ? signs << sign_bit(at) : 0;
    const unsigned index = active ? static_cast<unsigned>(sign_word(at)) : ~0u;
    bool is_first = lane % kLanes == 0;
    if (!g.whole_words) is_first = __shfl_up_sync(0xffffffffu, index, 1) != index || lane == 0;
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const unsigned others = __shfl_down_sync(0xffffffffu, word, distance);
      bool same = true;  // the first lane's, which is the only one that stores it
      if (!g.whole_words) same = __shfl_down_sync(0xffffffffu, index, distance) == index;
      if (same) word |= others;
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

  // The first pass over `count` steps from `begin` on: the thread's sums, and the output if it is `known`. What is not
  // written yet goes to keep(values, step).
  template <typename Keep>
  __device__ __forceinline__ void sum(int64_t begin, int count, bool known, Sums (&result)[kChannels],
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
    const auto add = [&](const Values& values, const A (&dz)[V]) {
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
        if (known) {
          if constexpr (kTensors == 1)  // a residual not ahead: that would take too many registers
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

  // The second pass over them.
  template <typename Load>
  __device__ __forceinline__ void write_all(int64_t begin, int count, const Load& load,
                                            const K (&constant)[kChannels]) const {
    for_each_vector<kSecondAhead>(begin, count, load, [&](int64_t at, const Values& values, int, bool active) {
      write(at, values, constant, active);
    });
  }

  // take(i, sums) in one thread for every channel i of the group, with what neighbouring lanes merge of its entries in
  // shared memory: `add` merges those that are a lane's.
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

  // Reduces the threads' sums: take(i, sums) in one thread for every channel i of the group. There is a barrier in it.
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
    } else {  // columns are no part of a warp: a channel's entries are those of its columns in all rows
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

  // The same of `count` times [group_channels] in global memory.
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
    for (int distance = kWarp / 2; distance >= g.group_channels; distance /= 2)
      mine.merge(mine.from_lane(distance));
    const bool wide = g.group_channels >= kWarp;  // then no two lanes of a warp are of one channel
    const int lane = threadIdx.x % kWarp;
    if (wide ? row < rows : lane < g.group_channels)
      sums[(wide ? row : threadIdx.x / kWarp) * g.group_channels + i] = mine;
    merge_rows(wide ? rows : blockDim.x / kWarp, take);
  }
};

template <typename Op, int V, bool kRows>
__global__ void __launch_bounds__(kMaxThreads, 1) resident_kernel(const Op op, const Geometry g) {
  using W = Worker<Op, V, kRows>;
  using Element = Packed<typename Op::Element, V>;
  SIMT_DYN_SHARED(unsigned char, shared);
  W worker(op, g, shared);
  worker.group = blockIdx.x;
  const int steps = static_cast<int>(g.steps);
  // a thread finds again what it put there itself: [steps of a thread, tensors, threads]
  Element* kept = reinterpret_cast<Element*>(shared + g.scratch_bytes) + threadIdx.x;

  worker.fetch(worker.group);
  bool known = false;
  if constexpr (W::kFirstPassNeedsConstants) {
    worker.share_known_constants();
    __syncthreads();
    known = !kRows && !worker.operands[0].batch;
  }
  typename Op::Sums sums[W::kChannels];
  worker.sum(0, steps, known, sums, [&](const typename W::Values& values, int step) {
    kept[W::kTensors * step * blockDim.x] = values.x;
    if constexpr (W::kTensors == 2) kept[(2 * step + 1) * blockDim.x] = values.beside;
  });
  worker.reduce(sums, [&](int i, const typename Op::Sums& total) {
    worker.constants[i] = op.finish(worker.channel(i), worker.operands[i], total);
  });
  if (known || steps == 0) return;
  __syncthreads();

  typename Op::K constant[W::kChannels];
  worker.read_constants(worker.constants, constant);
  const auto load = [&](int64_t at, int step) {
    typename W::Values values;
    values.x = kept[W::kTensors * step * blockDim.x];
    if constexpr (W::kTensors == 2) values.beside = kept[(2 * step + 1) * blockDim.x];
    else worker.load_residual(at, values);
    return values;
  };
  worker.write_all(0, steps, load, constant);
}

// The list of items of the sliced schedule. First passes over slices are as far ahead of second ones as a group is long
// and `lag` slices more; then they take turns. The second pass over a group begins with the slice that was read last.
struct Item {
  bool exists, first_pass;
  unsigned group, slice;

  __device__ __forceinline__ Item(unsigned ticket, const Geometry& g, unsigned lag) {
    const unsigned all = g.groups * g.slices, ahead = g.slices + lag;
    unsigned i = ticket;
    first_pass = i < ahead;
    if (!first_pass) {
      const unsigned turns = i - ahead, both = 2 * (all - ahead);
      first_pass = turns < both && turns % 2 == 1;
      i = turns >= both ? turns - both + all - ahead : first_pass ? ahead + turns / 2 : turns / 2;
    }
    exists = ticket < 2 * all;
    group = i / g.slices, slice = i - group * g.slices;
    if (!first_pass) slice = g.slices - 1 - slice;
  }
};

// What blocks share in global memory.
template <typename Op>
struct Workspace {
  typename Op::K* constants;    // [groups, group_channels]
  typename Op::Sums* slices;    // [groups, slices, group_channels]
  typename Op::Sums* sections;  // [groups, sections, group_channels], if there are several
  // counters, 0 before and after:
  unsigned* next_ticket;
  unsigned* arrived;           // [groups]: slices or sections summed, one for the constants, second passes begun
  unsigned* arrived_sections;  // [groups, sections], if there are several: slices summed
};

template <typename Op, int V, bool kRows>
__global__ void __launch_bounds__(kSlicedThreads, kBlocksPerMultiprocessor)
    sliced_kernel(const Op op, const Geometry g, const Workspace<Op> workspace, const unsigned lag) {
  using W = Worker<Op, V, kRows>;
  using Sums = typename Op::Sums;
  SIMT_DYN_SHARED(unsigned char, shared);
  SIMT_SHARED(unsigned, tickets, 2);  // drawn by thread 0: this item's and the next one's, in turns
  SIMT_SHARED(unsigned, before, 1);   // a counter, before thread 0 incremented it
  W worker(op, g, shared);
  // every block draws one ticket for which there is no item: with the last of them the counter is 0 again
  const unsigned last_ticket = 2 * g.groups * g.slices + gridDim.x - 1;
  const unsigned arrivals = g.sections > 1 ? g.sections : g.slices;

  // Fetches what the next item needs, while something else is on its way. For a second pass that is the mask alone: a
  // block that finishes the group may be writing the rest.
  const auto look_ahead = [&](unsigned ticket) {
    const Item item(ticket, g, lag);
    if (!item.exists) return;
    if (W::kFirstPassNeedsConstants && item.first_pass) worker.fetch(item.group);
    if (!kRows && !item.first_pass && worker.fetched_channel() == 0) worker.operands[0].batch = op.mask(item.group);
  };

  // A ticket orders nothing but itself: the data go from block to block by `arrived`.
  if (threadIdx.x == 0) tickets[0] = atomicInc(workspace.next_ticket, last_ticket);
  __syncthreads();
  look_ahead(tickets[0]);
  for (int turn = 0;; turn ^= 1) {
    __syncthreads();  // what is in shared memory of this item is there, and of the one before done with
    const Item item(tickets[turn], g, lag);
    if (!item.exists) return;
    // A block holds a later ticket beside its own. An item waits for smaller tickets only, and a block takes its own in
    // their order, so the smallest ticket that is not done is being worked on and waits for nothing.
    unsigned next = 0;
    if (threadIdx.x == 0) next = atomicInc(workspace.next_ticket, last_ticket);
    const int64_t begin = item.slice * g.slice_steps, rest = g.steps - begin;
    const int count = static_cast<int>(rest < g.slice_steps ? rest : g.slice_steps);
    const bool known = !kRows && !worker.operands[0].batch;
    worker.group = item.group;
    typename Op::K* constants = workspace.constants + worker.group * g.group_channels;
    unsigned* arrived = workspace.arrived + item.group;
    const unsigned last_arrival = known ? arrivals - 1 : arrivals + g.slices;

    if (item.first_pass) {
      if constexpr (W::kFirstPassNeedsConstants) {
        worker.share_known_constants();
        __syncthreads();
      }
      Sums sums[W::kChannels];
      worker.sum(begin, count, known, sums, [](const typename W::Values&, int) {});
      if (threadIdx.x == 0) tickets[turn ^ 1] = next;
      const Sums* partial = workspace.slices + worker.group * g.slices * g.group_channels;
      Sums* own = workspace.slices + (worker.group * g.slices + item.slice) * g.group_channels;
      worker.reduce(sums, [&](int i, const Sums& total) { own[i] = total; });
      __syncthreads();
      const unsigned section = g.sections > 1 ? item.slice / g.section_slices : 0;
      const unsigned first_slice = section * g.section_slices;
      unsigned parts = g.slices - first_slice < g.section_slices ? g.slices - first_slice : g.section_slices;
      unsigned* counter = arrived;
      if (g.sections > 1) counter = workspace.arrived_sections + uint64_t(item.group) * g.sections + section;
      if (threadIdx.x == 0) before[0] = increment_acquire_release(counter, g.sections > 1 ? parts - 1 : last_arrival);
      look_ahead(tickets[turn ^ 1]);
      __syncthreads();
      bool is_last = before[0] == parts - 1;  // which block that is makes no difference to the result
      if (is_last && g.sections > 1) {
        Sums* merged = workspace.sections + (worker.group * g.sections + section) * g.group_channels;
        worker.merge(partial + uint64_t(first_slice) * g.group_channels, parts,
                     [&](int i, const Sums& total) { merged[i] = total; });
        __syncthreads();
        if (threadIdx.x == 0) before[0] = increment_acquire_release(arrived, last_arrival);
        __syncthreads();
        partial = workspace.sections + worker.group * g.sections * g.group_channels, parts = g.sections;
        is_last = before[0] == parts - 1;
      }
      if (is_last) {
        worker.merge(partial, parts, [&](int i, const Sums& total) {
          const int64_t c = worker.channel(i);
          constants[i] = op.finish(c, op.fetch(c), total);
        });
        __syncthreads();
        if (threadIdx.x == 0 && !known) increment_release(arrived, last_arrival);
      }
    } else {
      if (threadIdx.x == 0) {
        if (!known) {
          wait_acquire(arrived, arrivals + 1);
          atomicInc(arrived, last_arrival);
        }
        tickets[turn ^ 1] = next;  // not before: it may still be on its way
      }
      __syncthreads();
      typename Op::K constant[W::kChannels] = {};
      if (!known) worker.read_constants(constants, constant);
      look_ahead(tickets[turn ^ 1]);
      const auto load = [&](int64_t at, int) {
        typename W::Values values;
        values.x = load_packed_last<V>(op.x + at);
        if constexpr (W::kTensors == 2) values.beside = load_packed<V>(op.gradient() + at);
        else worker.load_residual(at, values);
        return values;
      };
      if (!known) worker.write_all(begin, count, load, constant);
    }
  }
}

// ---- Launch

struct Shape {
  int64_t outer, channels, inner;
};

struct Plan {
  Geometry geometry;
  int threads, blocks;
  bool resident;
  size_t shared_bytes, workspace_bytes;
  int64_t counters;  // in global memory
  unsigned lag;      // sliced: of the second pass behind the first one, in slices beyond a group
};

inline int most_threads(const Device& device) {
  return std::min(kMaxThreads, device.threads_per_block / kWarp * kWarp);
}
inline int few_threads(const Device& device) { return std::min(kSlicedThreads, most_threads(device)); }

// The largest n with 1 << n <= value.
constexpr int log2_floor(int64_t value) { return value < 2 ? 0 : 1 + log2_floor(value / 2); }

// The one place that decides how a launch looks, for vectors of V elements.
template <typename Op, int V, bool kRows>
Plan choose_plan(const Shape& shape, const Device& device) {
  using W = Worker<Op, V, kRows>;
  constexpr int64_t kElementBytes = sizeof(typename Op::Element), kVectorBytes = Op::kTensors * V * kElementBytes;
  // What an item costs beside its loop is then a third of it in rows, two fifths in runs (benchmarks/gpu_model.py). With
  // longer ones it would be less, but blocks have nothing to do at the end, and the second pass finds less in the cache.
  constexpr int64_t kMostSliceBytes = (kRows ? 48 : 64) << 10;
  // A block alone reads that much in the time that sharing it among blocks would take beside the reading.
  constexpr int64_t kSmallGroupBytes = 64 << 10;
  constexpr int kRowBytes[] = {128, 64, 32};  // of channels_last: lines, or parts of them that memory still reads whole
  const bool channels_last = kRows && shape.inner == 1;
  Plan plan{};
  Geometry& g = plan.geometry;
  g.channels = shape.channels;
  g.run = shape.inner;
  g.row = shape.channels * shape.inner;
  g.steps = kRows ? shape.outer : shape.outer * shape.inner / V;
  g.inner_steps = kRows ? 1 : shape.inner / V;

  const auto cut = [&](int row_bytes) {
    g.columns = 1;
    if (channels_last)
      while (g.columns < kWarp && 2 * g.columns * V * kElementBytes <= row_bytes && g.columns * V < shape.channels &&
             2 * g.columns * V <= few_threads(device))
        g.columns *= 2;
    else if (kRows) g.columns = static_cast<int>(shape.inner / std::gcd<int64_t>(shape.inner, V));
    g.group_channels = kRows ? static_cast<int>(g.columns * V / shape.inner) : 1;
    g.log_channels = log2_floor(g.group_channels);
    g.groups = static_cast<unsigned>(ceil_div(shape.channels, g.group_channels));
    g.whole_words = g.row % kSignsPerWord == 0 && g.group_channels * g.run % kSignsPerWord == 0;
  };
  const auto group_bytes = [&] { return g.steps * g.columns * kVectorBytes; };
  const auto set_threads = [&](int most, bool resident) {
    g.lane_rows = most / g.columns;
    plan.threads = static_cast<int>(ceil_div(g.lane_rows * g.columns, kWarp) * kWarp);
    const int warps = plan.threads / kWarp;
    const int entries = kRows && !channels_last ? kWarp : std::min(kWarp, 2 * warps - 1);
    g.log_lanes = log2_floor(std::min(entries, plan.threads / g.group_channels));
    g.jump_in_run = kRows ? 0 : g.lane_rows % g.inner_steps;
    g.jump = kRows ? g.lane_rows * g.row : g.lane_rows / g.inner_steps * g.row + g.jump_in_run * V;
    g.wrap = g.row - g.inner_steps * V;
    g.scratch_bytes = static_cast<int>(W::scratch_bytes(g, plan.threads));
    plan.shared_bytes = g.scratch_bytes + (resident ? ceil_div(g.steps, g.lane_rows) * plan.threads * kVectorBytes : 0);
    return static_cast<int64_t>(plan.shared_bytes);
  };

  for (const int row_bytes : kRowBytes) {
    cut(row_bytes);
    // Few groups leave multiprocessors idle: half of them, and a few less, still read at the memory's speed.
    const bool enough = 16 * int64_t{g.groups} >= 7 * device.multiprocessors || group_bytes() <= kSmallGroupBytes;
    plan.resident = enough && set_threads(most_threads(device), true) <= device.shared_bytes;
    if (plan.resident || !channels_last) break;
  }
  if (plan.resident) {
    // one or two blocks are all that a multiprocessor holds of large groups: make them wide
    if (4 * set_threads(few_threads(device), true) > device.shared_bytes) set_threads(most_threads(device), true);
    plan.blocks = static_cast<int>(g.groups);
    g.slices = g.sections = 1;
    return plan;
  }

  // What the blocks read and write between the two passes over a group has to stay in the cache: a group, and a slice
  // for each of them. Six tenths of it leave room for a residual and a cache that replaces what is not the oldest.
  const int64_t blocks = kBlocksPerMultiprocessor * device.multiprocessors;
  const int64_t most_slice = std::max<int64_t>(1, std::min<int64_t>(kMostSliceBytes, device.cache_bytes / 3 / blocks));
  const auto stays_in_cache = [&] {
    return (group_bytes() + blocks * most_slice) * (Op::kTensors + 1) / Op::kTensors <= device.cache_bytes / 10 * 6;
  };
  cut(kRowBytes[0]);
  if (channels_last && !stays_in_cache()) {
    cut(kRowBytes[1]);
    if (!stays_in_cache()) cut(kRowBytes[0]);
  }
  set_threads(few_threads(device), false);
  // Slices are the same whatever follows the norm, and so are the sums, bit for bit; they end where all threads have had
  // equally many vectors. If blocks have but a few each, then equally many.
  int64_t slices = ceil_div(group_bytes(), most_slice);
  const int64_t rounds = ceil_div(g.groups * slices, blocks);
  if (rounds <= 4) slices = std::max(slices, rounds * blocks / g.groups);
  g.slice_steps = ceil_div(ceil_div(g.steps, slices), g.lane_rows) * g.lane_rows;
  g.slices = static_cast<unsigned>(ceil_div(g.steps, g.slice_steps));
  const int64_t merged_at_once = 4 * std::max(plan.threads >> g.log_channels, 1);
  g.section_slices = g.slices <= 2 * merged_at_once
                         ? g.slices
                         : std::max<unsigned>(merged_at_once, 1u << (log2_floor(g.slices) + 1) / 2);
  g.sections = static_cast<unsigned>(ceil_div(g.slices, g.section_slices));
  const int64_t items = int64_t{g.groups} * g.slices, sections = g.sections > 1 ? int64_t{g.groups} * g.sections : 0;
  plan.blocks = static_cast<int>(std::min(blocks, 2 * items));
  plan.lag = static_cast<unsigned>(std::min<int64_t>(items - g.slices, plan.blocks));
  plan.workspace_bytes = sizeof(typename Op::Sums) * (items + sections) * g.group_channels +
                         sizeof(typename Op::K) * g.groups * g.group_channels;
  plan.counters = 1 + g.groups + sections;
  return plan;
}

template <typename Op, int V, bool kRows>
void launch(const Op& op, const Plan& plan, const Device& device, void* memory, unsigned* counters,
            cudaStream_t stream) {
  const Geometry& g = plan.geometry;
  if constexpr (Op::kWritesSigns)
    if (op.signs != nullptr && !g.whole_words) {
      const int64_t elements = g.steps * (kRows ? g.row : g.channels * V);
      check(cudaMemsetAsync(op.signs, 0, sizeof(unsigned) * ceil_div(elements, kSignsPerWord), stream),
            "cudaMemsetAsync");
    }
  if (plan.resident) {
    allow_shared_bytes(resident_kernel<Op, V, kRows>, static_cast<int64_t>(plan.shared_bytes), device);
    SIMT_LAUNCH((resident_kernel<Op, V, kRows>), dim3(plan.blocks), dim3(plan.threads), plan.shared_bytes, stream, op,
                g);
    return;
  }
  Workspace<Op> workspace;
  workspace.constants = static_cast<typename Op::K*>(memory);
  workspace.slices = reinterpret_cast<typename Op::Sums*>(workspace.constants + int64_t{g.groups} * g.group_channels);
  workspace.sections = workspace.slices + int64_t{g.groups} * g.slices * g.group_channels;
  workspace.next_ticket = counters;
  workspace.arrived = counters + 1;
  workspace.arrived_sections = workspace.arrived + g.groups;
  SIMT_LAUNCH((sliced_kernel<Op, V, kRows>), dim3(plan.blocks), dim3(plan.threads), plan.shared_bytes, stream, op, g,
              workspace, plan.lag);
}

// The widest vectors that the shape and the addresses allow; f(integral_constant<V>, bool_constant<kRows>). In float64,
// whose exponential functions are long, there are none for what follows the norm.
template <typename Op, typename F>
void with_vectors(const Op& op, const Shape& shape, const Device& device, const F& f) {
  using T = typename Op::Element;
  constexpr int kWidest = sizeof(T) < 8 ? 16 / sizeof(T) : Op::kFused ? 1 : 2;
  const auto is_aligned = [&](int64_t bytes) {
    const auto aligned = [&](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
    bool others;
    if constexpr (Op::kTensors == 1) others = aligned(op.residual);
    else others = aligned(op.dy) && aligned(op.dz);
    return aligned(op.x) && aligned(op.out) && others;
  };
  // Whether f was called. Rows of runs need as many columns as vectors end at no channel, and a block has to hold them.
  const auto call = [&](auto vector) {
    constexpr int V = vector();
    if (!is_aligned(V * sizeof(T))) return false;
    const int64_t common = std::gcd<int64_t>(shape.inner, V);
    if (shape.inner == 1 && shape.channels % V == 0) f(vector, std::true_type{});
    else if (common == V) f(vector, std::false_type{});
    else if (shape.inner >= V && shape.channels % (V / common) == 0 && shape.inner / common <= few_threads(device))
      f(vector, std::true_type{});
    else return false;
    return true;
  };
  if (call(std::integral_constant<int, kWidest>{})) return;
  if constexpr (kWidest == 8)
    if (call(std::integral_constant<int, 4>{})) return;
  if constexpr (kWidest > 1) call(std::integral_constant<int, 1>{});
}

}  // namespace talib_fast::stoch_norm
