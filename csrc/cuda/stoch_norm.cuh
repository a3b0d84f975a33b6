// Stochastic normalisation on the GPU. Both directions take sums per channel, derive constants from them and write
// with these; a channel on running statistics is written while it is summed. Two schedules:
//
// resident: a block takes a group of channels whole, and keeps what it read in shared memory between the passes.
// sliced:   many blocks share a group. They take items off one list, on which the second pass over a group follows
//           its first one so closely that it reads from the L2 cache. One launch, no sync with the host.
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
struct Constants {
  A center, slope, offset, scale;
};

// And z = (x - center) * scale + shift, bit for bit what the forward pass made y of.
template <typename A>
struct ActivatedConstants : Constants<A> {
  A shift;
};

// Count, mean and sum of squared deviations from it.
template <typename A>
struct Moments {
  A count, mean, squares;

  __device__ __forceinline__ void merge(const Moments& other) {
    const A sum = count + other.count;
    if (sum == 0) return;
    const A difference = other.mean - mean, share = other.count / sum;
    mean += difference * share;
    // in this order: beside a mean of 1e20 those of no values at all give 0, where its square would give inf * 0
    squares += other.squares + difference * (count * share) * difference;
    count = sum;
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

  __device__ __forceinline__ Constants<A> constants(A mean, A invstd, int64_t c) const {
    return {mean, invstd * load_or<A>(weight, c, 1), load_or<A>(bias, c, 0), 0};
  }

  // All the way to the batch's where the momentum is 1, whatever the old one is.
  __device__ __forceinline__ A moved(A running, A batch) const {
    return momentum == 1 ? batch : running + momentum * (batch - running);
  }

  // The constants of a channel on running statistics.
  __device__ __forceinline__ Constants<A> known(int64_t c) const {
    return constants(load<A>(running_mean, c), A(1) / sqrt(load<A>(running_var, c) + eps), c);
  }

  __device__ __forceinline__ Constants<A> finish(int64_t c, const Sums& sums) const {
    const A old_mean = load<A>(running_mean, c), old_var = load<A>(running_var, c);
    const bool batch = mask(c) && count > 0;
    const A used_mean = batch ? sums.mean : old_mean;
    const A used_invstd = A(1) / sqrt((batch ? sums.squares / static_cast<A>(count) : old_var) + eps);
    mean[c] = used_mean, invstd[c] = used_invstd;
    if (count > 0) {
      const A unbiased = sums.squares / static_cast<A>(count > 1 ? count - 1 : 1);
      store(moved_mean, c, moved(old_mean, sums.mean));
      store(moved_var, c, moved(old_var, unbiased));
      if (c == 0 && batches != nullptr) ++*batches;
    } else if (moved_mean.data != running_mean.data) {  // in place they stay as they are: A may be too narrow for them
      store(moved_mean, c, old_mean), store(moved_var, c, old_var);
    }
    return constants(used_mean, used_invstd, c);
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

  // The constants of a channel on running statistics; those of z and its center are wanted in any case.
  __device__ __forceinline__ K known(int64_t c) const {
    const Constants<A> constants{mean[c], 0, 0, invstd[c] * load_or<A>(weight, c, 1)};
    if constexpr (kFused) return {constants, load_or<A>(bias, c, 0)};
    else return constants;
  }

  __device__ __forceinline__ K finish(int64_t c, const Sums& sums) const {
    K constants = known(c);
    const A dgamma = count > 0 ? sums.product * invstd[c] : A(0);  // invstd may be infinite
    dbias[c] = sums.sum, dweight[c] = dgamma;
    if (mask(c) && count > 0) {
      const A share = -constants.scale / static_cast<A>(count);
      constants.slope = share * dgamma * invstd[c], constants.offset = share * sums.sum;
    }
    return constants;
  }
};

// How a tensor [outer, channels, inner] is cut. A group of channels is a block's unit: one channel where its values
// lie in runs (inner > 1), a few neighbouring ones where they don't (inner == 1). Its threads form `columns` columns;
// a column walks over `steps` vectors. In slices these are `slice_steps` each.
struct Geometry {
  int64_t channels, groups, steps, slices, slice_steps;
  int64_t inner_steps;  // vectors in a run
  int64_t row;          // elements from a run to the channel's next one
  int64_t run;          // elements in a run
  int columns;          // a power of two, at most a warp
  int group_channels;
  bool whole_words;     // of signs: a word's elements are written by one warp at a time
  // a thread's way from one of its vectors to the next, blockDim.x / columns steps on:
  int64_t jump, jump_in_run;  // elements; vectors within the run
  int64_t wrap;               // elements on top if that leads past the end of the run
};

// Where a thread is in its column. All that is equal for all threads stays in the launch's parameters.
struct Walk {
  const Geometry& g;
  int64_t at, step_in_run;

  __device__ __forceinline__ Walk(const Geometry& geometry, int64_t base, int64_t first, int vector) : g(geometry) {
    const int64_t run = g.inner_steps == 1 ? first : first / g.inner_steps;
    step_in_run = first - run * g.inner_steps;
    at = base + run * g.row + step_in_run * vector;
  }
  __device__ __forceinline__ void advance() {
    at += g.jump;
    step_in_run += g.jump_in_run;
    if (step_in_run >= g.inner_steps) step_in_run -= g.inner_steps, at += g.wrap;
  }
};

// What one thread knows of its block's work on a group. V elements a vector; kRows: each is of a channel of its own.
template <typename Op, int V, bool kRows>
struct Worker {
  using T = typename Op::Element;
  using A = typename Op::A;
  using Sums = typename Op::Sums;
  using K = typename Op::K;
  static constexpr int kTensors = Op::kTensors;
  static constexpr int kChannels = kRows ? V : 1;  // per vector
  // loads ahead, as many as registers allow: two tensors whose elements have constants of their own take most
  static constexpr bool kFew = sizeof(T) == 8 || (kRows && V > 1 && kTensors == 2);
  static constexpr int kUnroll = kFew ? 2 : Op::kFused ? (V == 1 ? 4 : 3) : (V == 1 ? 8 : 4);

  struct Values {
    Vector<T, V> x, beside;  // dy, or dz in its place; the residual
    unsigned signs;
  };

  const Op& op;
  const Geometry& g;
  Sums* sums;    // [warps, group_channels] shared
  K* constants;  // [group_channels] shared
  int64_t group;

  __device__ __forceinline__ int column() const { return threadIdx.x % g.columns; }
  __device__ __forceinline__ int lane_row() const { return threadIdx.x / g.columns; }
  __device__ __forceinline__ int lane_rows() const { return blockDim.x / g.columns; }
  __device__ __forceinline__ int64_t channel(int i) const { return group * g.group_channels + i; }
  __device__ __forceinline__ bool is_channel(int i) const { return i < g.group_channels && channel(i) < g.channels; }
  __device__ __forceinline__ bool has_column() const { return is_channel(column() * kChannels); }

  __device__ __forceinline__ void load_residual(int64_t at, Values& values) const {
    if constexpr (Op::kFused)
      if (op.residual != nullptr) values.beside = load_vector<V>(op.residual + at);
  }

  // Calls take(at, values, step, true) for the thread's vectors among the steps [begin, end), a few loads ahead,
  // with values of load(at, step). Where lanes join their signs, all of a warp take part: those without a vector there
  // get false, and no values.
  template <typename Load, typename Take>
  __device__ __forceinline__ void for_each_vector(int64_t begin, int64_t end, const Load& load,
                                                  const Take& take) const {
    if (!Op::kWritesSigns && !has_column()) return;
    const int rows = lane_rows();
    const int behind = Op::kWritesSigns ? threadIdx.x % kWarp / g.columns : 0;  // the warp's first lane
    const int64_t own_end = Op::kWritesSigns && !has_column() ? begin : end;
    const int64_t base = kRows ? channel(column() * V) : group * g.run;
    Walk walk(g, base, begin + lane_row(), V);
    int step = 0;
    for (int64_t i = begin + lane_row(); i - behind < end; i += int64_t(kUnroll) * rows, step += kUnroll) {
      int64_t at[kUnroll];
      Values values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        at[u] = walk.at;
        walk.advance();
        if (i + u * rows < own_end) values[u] = load(at[u], step + u);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (i - behind + u * rows < end) take(at[u], values[u], step + u, i + u * rows < own_end);
    }
  }

  // Whether no channel of the group takes the batch's statistics; if so, they are written in the first pass. Of many
  // channels one nearly always does: the code for it is not worth its registers where they are scarce.
  __device__ __forceinline__ bool is_known() const {
    if constexpr (kRows && Op::kWritesSigns) {
      __syncthreads();
      return false;
    }
    bool batch = false;
    for (int i = threadIdx.x; is_channel(i); i += blockDim.x) batch |= op.mask(channel(i));
    return !__syncthreads_or(batch);
  }

  // Shares the constants that do not depend on the sums. A barrier has to follow.
  __device__ __forceinline__ void share_known_constants() const {
    for (int i = threadIdx.x; is_channel(i); i += blockDim.x) constants[i] = op.known(channel(i));
  }

  // Of the backward pass: dy in the type to calculate in, or dz in its place.
  __device__ __forceinline__ void gradient(const Values& values, const K (&constant)[kChannels], A (&dz)[V]) const {
    if constexpr (kTensors == 2)
      for_each_lane<V>([&](int lane) { dz[lane] = to_acc(values.beside.lane[lane]); });
    if constexpr (kTensors == 2 && Op::kFused) {
      if (op.signs != nullptr) return;  // it is dz
      A z[V];
      for_each_lane<V>([&](int lane) {
        const K& k = constant[kRows ? lane : 0];
        z[lane] = fma(to_acc(values.x.lane[lane]) - k.center, k.scale, k.shift);
      });
      op.activated.differentiate(z, dz);
    }
  }

  // The first pass makes dz of dy, where signs say how.
  __device__ __forceinline__ void apply_signs(int64_t at, Values& values) const {
    for_each_lane<V>([&](int lane) {
      T& value = values.beside.lane[lane];
      if (!(values.signs >> lane & 1)) value = from_acc<T>(op.activated.times_slope(to_acc(value)));
    });
    store_vector(op.dz + at, values.beside);
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
    A value[V];
    if constexpr (kTensors == 1) {
      for_each_lane<V>([&](int lane) {
        const K& k = constant[kRows ? lane : 0];
        value[lane] = fma(to_acc(values.x.lane[lane]) - k.center, k.slope, k.offset);
      });
      if constexpr (Op::kFused) {
        if (op.residual != nullptr)
          for_each_lane<V>([&](int lane) { value[lane] += to_acc(values.beside.lane[lane]); });
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
        const A affine = (to_acc(values.x.lane[lane]) - k.center) * k.slope + k.offset;
        // dx on running statistics does not depend on x, which may be infinite
        value[lane] = dz[lane] * k.scale + (k.slope == 0 ? k.offset : affine);
      });
    }
    Vector<T, V> result;
    for_each_lane<V>([&](int lane) { result.lane[lane] = from_acc<T>(value[lane]); });
    if (active) store_vector(op.out + at, result);
  }

  // Those of the thread's channels, from the group's.
  __device__ __forceinline__ void read_constants(const K* from, K (&constant)[kChannels]) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      constant[k] = has_column() ? from[column() * kChannels + k] : K{};
  }

  // The first pass over the steps [begin, end): the thread's sums, and the output if it is `known`. What is not
  // written yet goes to keep(values, step).
  template <typename Keep>
  __device__ __forceinline__ void sum(int64_t begin, int64_t end, bool known, Sums (&result)[kChannels],
                                      const Keep& keep) const {
    K constant[kChannels];
    read_constants(constants, constant);
    A center[kChannels], first[kChannels] = {}, second[kChannels] = {};
#pragma unroll
    for (int k = 0; k < kChannels; ++k) center[k] = kTensors == 2 ? constant[k].center : A(0);
    int64_t vectors = 0;
    const auto load = [&](int64_t at, int) {
      Values values;
      values.x = load_vector<V>(op.x + at);
      if constexpr (kTensors == 2) values.beside = load_vector<V>(op.dy + at);
      if constexpr (kTensors == 2 && Op::kFused)
        if (op.signs != nullptr) values.signs = op.signs[sign_word(at)] >> sign_bit(at);
      return values;
    };
    const auto add = [&](const Values& values, const A (&dz)[V]) {
      if constexpr (kTensors == 1) {  // squares are taken of differences to the thread's first value
        if (vectors == 0) {
#pragma unroll
          for (int k = 0; k < kChannels; ++k) center[k] = to_acc(values.x.lane[k]);
        }
      }
      ++vectors;
      for_each_lane<V>([&](int lane) {
        const int k = kRows ? lane : 0;
        const A difference = to_acc(values.x.lane[lane]) - center[k];
        const A term = kTensors == 1 ? difference : dz[lane];
        first[k] += term;
        second[k] += term * difference;
      });
    };
    for_each_vector(begin, end, load, [&](int64_t at, Values& values, int step, bool active) {
      if constexpr (Op::kFused && kTensors == 2)
        if (op.signs != nullptr) apply_signs(at, values);
      A dz[V];
      gradient(values, constant, dz);
      if (active) add(values, dz);
      if (!known) {
        if (active) keep(values, step);
        return;
      }
      if constexpr (kTensors == 1)  // a residual not ahead: that would take too many registers
        if (active) load_residual(at, values);
      write(at, values, dz, constant, active);
    });
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      if constexpr (kTensors == 1) {
        const A count = static_cast<A>(vectors * (V / kChannels));
        const A shifted = vectors == 0 ? A(0) : first[k] / count;
        const A squares = second[k] - shifted * first[k];
        result[k] = {count, center[k] + shifted, squares < 0 ? A(0) : squares};
      } else {
        result[k] = {first[k], second[k]};
      }
    }
  }

  // Reduces the threads' sums. Thread i < group_channels gets those of the group's channel i.
  __device__ __forceinline__ Sums reduce(Sums (&thread_sums)[kChannels]) const {
#pragma unroll
    for (int k = 0; k < kChannels; ++k)
      for (int distance = kWarp / 2; distance >= g.columns; distance /= 2)
        thread_sums[k].merge(thread_sums[k].from_lane(distance));
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    if (lane < g.columns) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) sums[warp * g.group_channels + lane * kChannels + k] = thread_sums[k];
    }
    __syncthreads();
    Sums total{};
    const int i = threadIdx.x;
    if (i < g.group_channels)
      for (int w = 0; w < warps; ++w) total.merge(sums[w * g.group_channels + i]);
    return total;
  }
};

template <typename Op>
__host__ __device__ inline size_t scratch_bytes(int group_channels, int threads) {
  const size_t sums = threads / kWarp * sizeof(typename Op::Sums);
  return (group_channels * (sizeof(typename Op::K) + sums) + 15) / 16 * 16;
}

template <typename Op, int V, bool kRows>
__device__ __forceinline__ Worker<Op, V, kRows> make_worker(const Op& op, const Geometry& g, unsigned char* shared) {
  using Sums = typename Op::Sums;
  using K = typename Op::K;
  K* constants = reinterpret_cast<K*>(shared);
  return {op, g, reinterpret_cast<Sums*>(constants + g.group_channels), constants, 0};
}

template <typename Op, int V, bool kRows>
__global__ void __launch_bounds__(kMaxThreads, 1) resident_kernel(const Op op, const Geometry g) {
  using W = Worker<Op, V, kRows>;
  using Element = Vector<typename Op::Element, V>;
  SIMT_DYN_SHARED(unsigned char, shared);
  W worker = make_worker<Op, V, kRows>(op, g, shared);
  worker.group = blockIdx.x;
  // a thread finds again what it put there itself: [steps of a thread, tensors, threads]
  Element* kept = reinterpret_cast<Element*>(shared + scratch_bytes<Op>(g.group_channels, blockDim.x)) + threadIdx.x;

  worker.share_known_constants();
  const bool known = worker.is_known();
  typename Op::Sums sums[W::kChannels];
  worker.sum(0, g.steps, known, sums, [&](const typename W::Values& values, int step) {
    kept[W::kTensors * step * blockDim.x] = values.x;
    if constexpr (W::kTensors == 2) kept[(2 * step + 1) * blockDim.x] = values.beside;
  });
  const typename Op::Sums total = worker.reduce(sums);
  if (worker.is_channel(threadIdx.x))
    worker.constants[threadIdx.x] = op.finish(worker.channel(threadIdx.x), total);
  if (known || !g.steps) return;
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
  worker.for_each_vector(0, g.steps, load, [&](int64_t at, const typename W::Values& values, int, bool active) {
    worker.write(at, values, constant, active);
  });
}

// The list of items of the sliced schedule: `lag` groups ahead, the first pass over a group and the second pass over
// an earlier one in turns.
struct Item {
  bool first_pass;
  int64_t group, slice;

  __device__ __forceinline__ Item(unsigned ticket, const Geometry& g, int64_t lag) {
    const int64_t ahead = lag * g.slices, turns = 2 * (g.groups - lag) * g.slices;
    int64_t i = ticket;
    if (i < ahead) {
      first_pass = true, group = i / g.slices;
    } else if (i -= ahead; i < turns) {
      first_pass = i / g.slices % 2 == 0, group = i / g.slices / 2 + (first_pass ? lag : 0);
    } else {
      i -= turns;
      first_pass = false, group = g.groups - lag + i / g.slices;
    }
    slice = i % g.slices;
  }
};

// What blocks share in global memory.
template <typename Op>
struct Workspace {
  unsigned* next_ticket;
  unsigned* arrived;          // [groups]: slices summed, plus one when the constants are there
  typename Op::Sums* sums;    // [groups, slices, group_channels]
  typename Op::K* constants;  // [groups, group_channels]
};

template <typename Op, int V, bool kRows>
__global__ void __launch_bounds__(kSlicedThreads, kBlocksPerMultiprocessor)
    sliced_kernel(const Op op, const Geometry g, const Workspace<Op> workspace, const int64_t lag) {
  using W = Worker<Op, V, kRows>;
  using Sums = typename Op::Sums;
  SIMT_DYN_SHARED(unsigned char, shared);
  SIMT_SHARED(unsigned, message, 2);  // from thread 0 to the block: the ticket, and how many slices had arrived
  W worker = make_worker<Op, V, kRows>(op, g, shared);
  const int64_t items = 2 * g.groups * g.slices;

  // A ticket orders nothing but itself: the data go from block to block by `arrived`.
  if (threadIdx.x == 0) message[0] = atomicAdd(workspace.next_ticket, 1u);
  __syncthreads();
  for (unsigned ticket = message[0]; ticket < items; ticket = message[0]) {
    // A block holds a later ticket beside its own. An item waits for smaller tickets only, and a block takes its own in
    // their order, so the smallest ticket that is not done is being worked on and waits for nothing.
    unsigned next = 0;
    if (threadIdx.x == 0) next = atomicAdd(workspace.next_ticket, 1u);
    const Item item(ticket, g, lag);
    const int64_t begin = item.slice * g.slice_steps;
    const int64_t end = begin + g.slice_steps < g.steps ? begin + g.slice_steps : g.steps;
    worker.group = item.group;
    unsigned* arrived = workspace.arrived + item.group;
    typename Op::K* constants = workspace.constants + item.group * g.group_channels;
    if (item.first_pass) worker.share_known_constants();
    const bool known = worker.is_known();

    if (item.first_pass) {
      Sums sums[W::kChannels];
      worker.sum(begin, end, known, sums, [](const typename W::Values&, int) {});
      const Sums slice_total = worker.reduce(sums);
      Sums* group_sums = workspace.sums + item.group * g.slices * g.group_channels;
      const int i = threadIdx.x;
      if (i < g.group_channels) group_sums[item.slice * g.group_channels + i] = slice_total;
      __syncthreads();
      if (threadIdx.x == 0) message[1] = add_acquire_release(arrived, 1);
      __syncthreads();
      if (message[1] == g.slices - 1) {  // the last to arrive; which block that is makes no difference to the result
        Sums merged[W::kChannels] = {};
        for (int64_t slice = worker.lane_row(); slice < g.slices; slice += worker.lane_rows())
#pragma unroll
          for (int k = 0; k < W::kChannels; ++k)
            merged[k].merge(group_sums[slice * g.group_channels + worker.column() * W::kChannels + k]);
        const Sums total = worker.reduce(merged);
        if (worker.is_channel(threadIdx.x))
          constants[threadIdx.x] = op.finish(worker.channel(threadIdx.x), total);
        __syncthreads();
        if (threadIdx.x == 0) add_release(arrived, 1);
      }
    } else if (!known) {
      if (threadIdx.x == 0)
        while (load_acquire(arrived) <= g.slices) pause();
      __syncthreads();
      typename Op::K constant[W::kChannels];
      worker.read_constants(constants, constant);
      const auto load = [&](int64_t at, int) {
        typename W::Values values;
        values.x = load_vector<V>(op.x + at);
        if constexpr (W::kTensors == 2) values.beside = load_vector<V>(op.gradient() + at);
        else worker.load_residual(at, values);
        return values;
      };
      worker.for_each_vector(begin, end, load, [&](int64_t at, const typename W::Values& values, int, bool active) {
        worker.write(at, values, constant, active);
      });
    }
    __syncthreads();
    if (threadIdx.x == 0) message[0] = next;
    __syncthreads();
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
  int64_t lag;  // sliced: by how many groups the first pass is ahead of the second
};

// The one place that decides how a launch looks, for vectors of V elements.
template <typename Op, int V, bool kRows>
Plan choose_plan(const Shape& shape, const Device& device) {
  constexpr int64_t kVectorBytes = Op::kTensors * V * sizeof(typename Op::Element);
  constexpr int kRowBytes = 128;  // of each row, a group of channels takes this much: whole lines
  // long enough that a ticket, two reductions and a wait for the constants are little beside it, and short enough that
  // the blocks are done at nearly the same time
  constexpr int64_t kMostSliceBytes = 32 << 10;
  const int most_threads = std::min(kMaxThreads, device.threads_per_block / kWarp * kWarp);
  const int few_threads = std::min(kSlicedThreads, most_threads);
  Plan plan{};
  Geometry& g = plan.geometry;
  g.channels = shape.channels;
  g.columns = 1;
  if (kRows)
    while (g.columns < kWarp && 2 * g.columns * V * sizeof(typename Op::Element) <= kRowBytes &&
           g.columns * V < shape.channels && 2 * g.columns * V <= most_threads)
      g.columns *= 2;
  g.group_channels = kRows ? g.columns * V : 1;
  g.groups = ceil_div(shape.channels, g.group_channels);
  g.steps = shape.outer * shape.inner / (kRows ? 1 : V);
  g.inner_steps = kRows ? 1 : shape.inner / V;
  g.row = shape.channels * shape.inner;
  g.run = shape.inner;
  g.whole_words = (kRows ? shape.channels : shape.inner) % kSignsPerWord == 0 &&
                  (!kRows || g.group_channels % kSignsPerWord == 0);

  const auto shared_bytes = [&](int threads, bool resident) {
    const int64_t kept = resident ? ceil_div(g.steps * g.columns, threads) * threads * kVectorBytes : 0;
    return static_cast<int64_t>(scratch_bytes<Op>(g.group_channels, threads)) + kept;
  };
  const auto set_threads = [&](int threads) {
    const int64_t stride = threads / g.columns;
    plan.threads = threads;
    g.jump_in_run = stride % g.inner_steps;
    g.jump = stride / g.inner_steps * g.row + g.jump_in_run * V;
    g.wrap = g.row - g.inner_steps * V;
  };
  // Few groups leave multiprocessors idle, unless they are too small to share.
  const bool enough = 2 * g.groups >= device.multiprocessors || g.steps * g.columns * kVectorBytes <= kMostSliceBytes;
  plan.resident = enough && shared_bytes(most_threads, true) <= device.shared_bytes;
  if (plan.resident) {
    // one or two blocks are all that a multiprocessor holds of large groups: make them wide
    set_threads(4 * shared_bytes(few_threads, true) <= device.shared_bytes ? few_threads : most_threads);
    plan.blocks = static_cast<int>(g.groups);
    plan.shared_bytes = shared_bytes(plan.threads, true);
    g.slices = 1;
    g.slice_steps = g.steps;
    return plan;
  }
  set_threads(few_threads);
  plan.shared_bytes = shared_bytes(plan.threads, false);
  const int64_t blocks = kBlocksPerMultiprocessor * device.multiprocessors;
  // What the blocks read between the two passes over a group has to stay in the cache: `lag` groups, which is one slice
  // a block and a group more, and as much again as is written meanwhile, and as is read of a residual. A quarter leaves
  // room for all of it, and for a cache that replaces what is not the oldest. Slices are the same whatever follows the
  // norm, and so are the sums, bit for bit; they end where all threads have had equally many vectors.
  const int64_t slice_bytes = std::min<int64_t>(kMostSliceBytes, device.cache_bytes / 4 / blocks);
  const int64_t rows = plan.threads / g.columns;
  g.slice_steps = std::max<int64_t>(slice_bytes / (g.columns * kVectorBytes) / rows, 1) * rows;
  g.slices = ceil_div(g.steps, g.slice_steps);
  plan.blocks = static_cast<int>(std::min(blocks, 2 * g.groups * g.slices));
  plan.lag = std::min(g.groups, ceil_div(plan.blocks, g.slices) + 1);
  plan.workspace_bytes = sizeof(typename Op::K) * g.groups * g.group_channels +
                         sizeof(typename Op::Sums) * g.groups * g.slices * g.group_channels +
                         sizeof(unsigned) * (g.groups + 1);
  return plan;
}

template <typename Op, int V, bool kRows>
void launch(const Op& op, const Plan& plan, const Device& device, void* memory, cudaStream_t stream) {
  const Geometry& g = plan.geometry;
  if constexpr (Op::kWritesSigns)
    if (op.signs != nullptr && !g.whole_words) {
      const int64_t elements = g.channels * g.steps * (kRows ? 1 : V);
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
  workspace.sums = reinterpret_cast<typename Op::Sums*>(workspace.constants + g.groups * g.group_channels);
  workspace.next_ticket = reinterpret_cast<unsigned*>(workspace.sums + g.groups * g.slices * g.group_channels);
  workspace.arrived = workspace.next_ticket + 1;
  check(cudaMemsetAsync(workspace.next_ticket, 0, sizeof(unsigned) * (g.groups + 1), stream), "cudaMemsetAsync");
  SIMT_LAUNCH((sliced_kernel<Op, V, kRows>), dim3(plan.blocks), dim3(plan.threads), plan.shared_bytes, stream, op, g,
              workspace, plan.lag);
}

// The widest vectors that the shape and the addresses allow; f(integral_constant<V>, bool_constant<kRows>). In float64,
// whose exponential functions are long, there are none for what follows the norm.
template <typename Op, typename F>
void with_vectors(const Op& op, const Shape& shape, const F& f) {
  constexpr int kWidest = sizeof(typename Op::Element) < 8 ? 4 : Op::kFused ? 1 : 2;
  const bool rows = shape.inner == 1;
  const int64_t run = rows ? shape.channels : shape.inner;
  const auto fits = [&](int vector) {
    const auto aligned = [&](const void* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (vector * sizeof(typename Op::Element)) == 0;
    };
    bool others;
    if constexpr (Op::kTensors == 1) others = aligned(op.residual);
    else others = aligned(op.dy) && aligned(op.dz);
    return run % vector == 0 && aligned(op.x) && aligned(op.out) && others;
  };
  const auto call = [&](auto vector) { rows ? f(vector, std::true_type{}) : f(vector, std::false_type{}); };
  if (fits(kWidest)) return call(std::integral_constant<int, kWidest>{});
  call(std::integral_constant<int, 1>{});
}

}  // namespace talib_fast::stoch_norm
