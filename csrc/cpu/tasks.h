// Shares out work on large tensors to torch's threads.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../operands.h"

namespace talib_fast {

// sizes of caches that a thread may count on; what glibc says of them is wrong on some virtual machines
constexpr int64_t kOwnCache = 512 << 10, kSharedCache = 32 << 20;

// First-touch page faults of a fresh large output cost more than its arithmetic; huge pages make them rare.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Hands out [0, tasks) to torch's threads one by one. A thread begins with its own range. It is the same in every call,
// and about what PyTorch's operators give the thread of a tensor, so that its cache may still hold it. With a random
// mask some tasks take longer, so a thread goes on with what is left of the other ranges.
template <typename F>
void for_each_task(int64_t tasks, int64_t elements, const F& f, bool backwards = false) {
  constexpr int64_t kSerialElements = 32768;
  const int64_t threads = elements < kSerialElements ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(backwards ? tasks - 1 - task : task);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> taken = 0;
  };
  std::vector<Range> ranges(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t range = (own + i) % threads;
      const int64_t begin = range * tasks / threads, end = (range + 1) * tasks / threads;
      for (int64_t taken; (taken = ranges[range].taken.fetch_add(1, std::memory_order_relaxed)) < end - begin;)
        f(backwards ? end - 1 - taken : begin + taken);
    }
  });
}

}  // namespace talib_fast
