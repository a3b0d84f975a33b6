// The two directions: their operands, and what they derive from a channel's sums.
#pragma once

#include "activation.cuh"
#include "channel.cuh"
#include "sums.cuh"

namespace talib_fast::stoch_norm {

// y = (x - center) * slope + offset        dx = dy * scale + (x - center) * slope + offset
template <typename A>
struct alignas(16) Constants {
  A center, slope, offset, scale;
};

// With these also z = (x - center) * scale + shift, to the last bit as in the forward pass.
template <typename A>
struct ActivatedConstants : Constants<A> {
  A shift;
};

// What an operation reads of a channel beside its values.
template <typename A>
struct Operands {
  bool uses_batch_stats;
  A mean, var_or_rstd;  // the running mean and variance; in the backward pass the mean and 1 / standard deviation used
  A weight, bias;
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
  A* __restrict__ mean;            // [channels]
  A* __restrict__ rstd;            // [channels]
  ChannelMask mask;
  ChannelVector weight, bias, running_mean, running_var;
  ChannelVector updated_mean, updated_var;  // the running statistics again, or where their new values go instead
  int64_t* __restrict__ batches;            // null: not to be counted
  A momentum, eps;
  int64_t count;  // values per channel
  Activated<A> activated;

  __device__ __forceinline__ Operands<A> fetch(int64_t c) const {
    const A mean = load<A>(running_mean, c), var = load<A>(running_var, c);
    return {mask(c), mean, var, load_or<A>(weight, c, 1), load_or<A>(bias, c, 0)};
  }

  // With a momentum of 1 it is the batch's, whatever the old one is.
  __device__ __forceinline__ A updated(A running, A batch) const {
    return momentum == 1 ? batch : running + momentum * (batch - running);
  }

  // The constants of a channel on running statistics.
  __device__ __forceinline__ Constants<A> initial_constants(const Operands<A>& channel) const {
    return {channel.mean, A(1) / sqrt(channel.var_or_rstd + eps) * channel.weight, channel.bias, 0};
  }

  __device__ __forceinline__ Constants<A> finish(int64_t c, const Operands<A>& channel, const Sums& sums) const {
    const bool batch = channel.uses_batch_stats && count > 0;
    const A used_mean = batch ? sums.mean : channel.mean;
    const A used_rstd = A(1) / sqrt((batch ? sums.squares / static_cast<A>(count) : channel.var_or_rstd) + eps);
    mean[c] = used_mean, rstd[c] = used_rstd;
    if (count > 0) {
      const A unbiased = sums.squares / static_cast<A>(count > 1 ? count - 1 : 1);
      store(updated_mean, c, updated(channel.mean, sums.mean));
      store(updated_var, c, updated(channel.var_or_rstd, unbiased));
      if (c == 0 && batches != nullptr) ++*batches;
    } else if (updated_mean.data != running_mean.data) {
      // in place they stay untouched: A may be too narrow for them
      store(updated_mean, c, channel.mean), store(updated_var, c, channel.var_or_rstd);
    }
    return {used_mean, used_rstd * channel.weight, channel.bias, 0};
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
  const A* __restrict__ rstd;          // [channels]
  ChannelMask mask;
  ChannelVector weight, bias;
  A* __restrict__ dweight;  // [channels]
  A* __restrict__ dbias;    // [channels]
  int64_t count;            // values per channel
  Activated<A> activated;

  // The gradient that the second pass reads.
  __device__ __forceinline__ const T* gradient() const {
    if constexpr (kFused)
      if (signs != nullptr) return dz;
    return dy;
  }

  __device__ __forceinline__ Operands<A> fetch(int64_t c) const {
    return {mask(c), mean[c], rstd[c], load_or<A>(weight, c, 1), kFused ? load_or<A>(bias, c, 0) : A(0)};
  }

  // The constants of a channel on running statistics. Every channel needs the center, and the constants of z.
  __device__ __forceinline__ K initial_constants(const Operands<A>& channel) const {
    const Constants<A> constants{channel.mean, 0, 0, channel.var_or_rstd * channel.weight};
    if constexpr (kFused) return {constants, channel.bias};
    else return constants;
  }

  __device__ __forceinline__ K finish(int64_t c, const Operands<A>& channel, const Sums& sums) const {
    K constants = initial_constants(channel);
    const A dgamma = count > 0 ? sums.product * channel.var_or_rstd : A(0);  // the rstd may be infinite
    dbias[c] = sums.sum, dweight[c] = dgamma;
    if (channel.uses_batch_stats && count > 0) {
      const A share = -constants.scale / static_cast<A>(count);
      constants.slope = share * dgamma * channel.var_or_rstd, constants.offset = share * sums.sum;
    }
    return constants;
  }
};

}  // namespace talib_fast::stoch_norm
