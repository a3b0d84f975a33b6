// Shared memory of the running block.
#pragma once

#include "engine.h"

namespace simt {

inline char dynamic_tag;  // all names of dynamic shared memory mean the same array

// The running block's array with that tag, initially full of NaN.
SIMT_UNTRACKED inline void* shared_array(const void* tag, size_t bytes, size_t alignment, At at) {
  Engine& e = engine();
  for (unsigned i = 0; i < e.shared_count; ++i) {
    if (e.shared[i].tag == tag) {
      return e.shared[i].memory;
    }
  }
  if (e.shared_count == kMaxSharedArrays) {
    die(at, "more than %u shared arrays", kMaxSharedArrays);
  }
  if (tag != &dynamic_tag) {
    e.static_bytes += bytes;
    if (e.static_bytes > kDefaultSharedBytes || e.static_bytes + e.launch->dynamic_bytes > e.launch->shared_limit) {
      die(at, "%zu bytes of static and %zu of dynamic shared memory are more than a block's %zu,", e.static_bytes,
          e.launch->dynamic_bytes, e.launch->shared_limit);
    }
  }
  hide_writes();
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max<size_t>(alignment, 16), bytes)) {
    die(at, "no memory for a shared array");
  }
  std::memset(memory, 0xff, bytes);
  show_writes();
  e.shared[e.shared_count++] = {tag, memory};
  return memory;
}

SIMT_UNTRACKED inline void* dynamic_shared_array(At at) {
  return shared_array(&dynamic_tag, engine().launch->dynamic_bytes, 16, at);
}

SIMT_UNTRACKED inline void free_shared_arrays() {
  Engine& e = engine();
  hide_writes();
  while (e.shared_count) {
    std::free(e.shared[--e.shared_count].memory);
  }
  show_writes();
  e.static_bytes = 0;
}

}  // namespace simt
