// Counters that begin again at 0 after their last increment, so that a kernel leaves them at 0. A launch then needs no
// memset before it, which would take as long as a small kernel.
#pragma once

#include "../operands.h"
#include "runtime.cuh"

#include <map>
#include <mutex>
#include <utility>

namespace talib_fast {

constexpr int kCounterSets = 64, kCountersInSet = 4096;
static __device__ unsigned counter_sets[kCounterSets][kCountersInSet];  // of one file's kernels, on every device

// The set of counters of a stream, whose kernels follow one another and so can share it. Null where a stream has no
// set: too many streams of the device have one, or the stream is being captured and its graph may run beside it.
static unsigned* counters_of(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const bool asked = cudaStreamIsCapturing(stream, &capture) == cudaSuccess;
  if (!asked) (void)cudaGetLastError();
  if (!asked || capture != cudaStreamCaptureStatusNone) return nullptr;
  int device = 0;
  unsigned long long id = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");

  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, unsigned*> sets;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = sets.find({device, id});
  if (found != sets.end()) return found->second;
  const auto first = sets.lower_bound({device, 0}), last = sets.lower_bound({device + 1, 0});
  const auto taken = std::distance(first, last);
  if (taken == kCounterSets) return nullptr;
  void* memory = nullptr;
  check(cudaGetSymbolAddress(&memory, counter_sets), "cudaGetSymbolAddress");
  return sets[{device, id}] = static_cast<unsigned*>(memory) + taken * kCountersInSet;
}

// `count` counters that are 0, for one launch.
class Counters {
 public:
  Counters(const Tensor& like, int64_t count, cudaStream_t stream)
      : kept_(0 < count && count <= kCountersInSet ? counters_of(stream) : nullptr),
        memory_(like, kept_ == nullptr ? count * static_cast<int64_t>(sizeof(unsigned)) : 0) {
    if (kept_ == nullptr && count > 0)
      check(cudaMemsetAsync(memory_.data(), 0, count * sizeof(unsigned), stream), "cudaMemsetAsync");
  }
  unsigned* data() const { return kept_ != nullptr ? kept_ : reinterpret_cast<unsigned*>(memory_.data()); }

 private:
  unsigned* kept_;
  Scratch memory_;
};

}  // namespace talib_fast
