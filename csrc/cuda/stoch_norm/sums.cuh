// The sums that the first pass of each direction takes of a channel, and how two of them are merged.
#pragma once

#include "channel.cuh"

namespace talib_fast::stoch_norm {

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
    // in this order no values beside a mean of 1e20 give 0; the square of that mean would give inf * 0
    squares += other.squares + difference * (count * share) * difference;
    count = sum;
  }
  // Joins lanes with equal counts: those before `split`, and the rest.
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

}  // namespace talib_fast::stoch_norm
