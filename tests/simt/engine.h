// The state of a launch, of the running block and of its threads. fibers.h, waiting.h, shared_memory.h and launch.h use
// it.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <source_location>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_types.h"

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_USES_UCONTEXT 1
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace simt {

using At = std::source_location;

// ThreadSanitizer must see what kernels do, but not what the harness does to run them.
#define SIMT_UNTRACKED __attribute__((no_sanitize("thread")))

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kPageBytes = 4096;

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kWarpSize;
constexpr unsigned kMaxSharedArrays = 64;
constexpr size_t kDefaultSharedBytes = 48 << 10;  // kernels need cudaFuncSetAttribute for more

// For ThreadSanitizer a fiber is a thread, and its order with other threads of a block stays for ever. So two sets of
// fibers run the blocks in turn, and neighbouring blocks are not ordered.
constexpr unsigned kFiberSets = kThreadSanitizer ? 2 : 1;
constexpr unsigned kMaxTrackedThreads = 3 * kMaxThreads;  // ThreadSanitizer can track 8000 threads

// For ThreadSanitizer the address of a clock is a happens-before edge from threads that release it to threads that
// acquire it later. The alignment is needed, since ThreadSanitizer keeps one clock for every 8 bytes.
struct alignas(16) Clock {
  char address;
};

struct Fiber {  // a stack to which the processor can switch
  char* stack;
  size_t stack_bytes;
#if defined(SIMT_USES_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
#if defined(__SANITIZE_THREAD__)
  void* tsan_fiber;
#endif
};

struct Thread {
  uint3 index;  // threadIdx
  unsigned lane, warp;
  Fiber* fiber;  // while the thread waits
};

enum class Operation { kShuffle, kVote, kSync };

struct Collective {  // a warp operation that has begun
  Operation operation;
  unsigned mask, arrived, readers;
  At at;
  Clock* clock;
  Collective* next_free;
  alignas(16) unsigned char value[kWarpSize][16];
};

struct Warp {
  unsigned live;  // lanes that have not returned
  unsigned pending_count;
  Collective* pending[kWarpSize];
  unsigned syncs;
  Clock sync_clock[kFiberSets][2];  // used in turn, like the block's barrier_clock
};

struct Launch {  // the state that the blocks of a launch share
  const char* kernel_name;
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_bytes, shared_limit;
  void (*call)(void*);  // the kernel with its arguments
  void* call_data;
  uint64_t seed;
  unsigned blocks_in_flight;
  uint64_t block_count, next_block;
  unsigned engines_running;
  unsigned events;  // progress of all blocks: number of threads that returned and of barriers that opened
};

struct SharedArray {
  const void* tag;
  void* memory;
};

struct Engine {  // runs one block at a time; plain data, used by one operating-system thread
  Launch* launch;
  uint3 block_index;  // blockIdx
  unsigned fiber_set;
  uint64_t random_state;

  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Thread* self;  // the running thread; null in the launcher
  unsigned thread_count, started, live;
  unsigned order[kMaxThreads];  // the order in which threads start

  unsigned ready[kMaxThreads], ready_head, ready_count;  // a ring of the threads that can continue
  unsigned at_barrier[kMaxThreads], at_barrier_count;
  At barrier_at;
  unsigned barriers;
  // A thread may reach the next barrier before another thread has left this one. Two clocks keep them unordered.
  Clock barrier_clock[kFiberSets][2];
  bool votes[2];  // of __syncthreads_or, used in turn as well
  Clock begin_clock, end_clock;

  Fiber launcher;
  Fiber* current;
  Fiber fibers[kFiberSets * kMaxThreads];
  unsigned fiber_count;
  Fiber* idle_fibers[kMaxThreads];
  unsigned idle_count;

  Collective collectives[kMaxThreads];
  unsigned collective_count;
  Collective* free_collectives;

  SharedArray shared[kMaxSharedArrays];
  unsigned shared_count;
  size_t static_bytes;

  unsigned events_seen, pauses;
};

inline thread_local Engine* engine_of_this_thread = nullptr;

SIMT_UNTRACKED inline void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("simt: mmap");
    std::abort();
  }
  return memory;
}

SIMT_UNTRACKED __attribute__((noinline, cold)) inline void make_engine() {
  engine_of_this_thread = static_cast<Engine*>(map_memory(sizeof(Engine)));  // zeros
}

SIMT_UNTRACKED inline Engine& engine() {
  if (!engine_of_this_thread) [[unlikely]] {
    make_engine();
  }
  return *engine_of_this_thread;
}

SIMT_UNTRACKED inline Thread& self() { return *engine().self; }
SIMT_UNTRACKED inline unsigned lane() { return self().lane; }

// Prints the place and aborts.
[[noreturn]] SIMT_UNTRACKED inline void die(At at, const char* format, ...) {
  const Engine& e = engine();
  std::fflush(stdout);
  std::fprintf(stderr, "simt: ");
  va_list values;
  va_start(values, format);
  std::vfprintf(stderr, format, values);
  va_end(values);
  std::fprintf(stderr, " at %s:%u", at.file_name(), static_cast<unsigned>(at.line()));
  if (e.launch) {
    std::fprintf(stderr, ", in kernel %s", e.launch->kernel_name);
    std::fprintf(stderr, ", block (%u,%u,%u)", e.block_index.x, e.block_index.y, e.block_index.z);
  }
  if (e.self) {
    std::fprintf(stderr, ", thread (%u,%u,%u)", e.self->index.x, e.self->index.y, e.self->index.z);
  }
  std::fprintf(stderr, "\n");
  std::abort();
}

inline uint64_t setting(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 0) : otherwise;
}

// Used instead of memcpy, whose interceptor would show the harness's own accesses to ThreadSanitizer.
SIMT_UNTRACKED inline void copy_bytes(void* to, const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    static_cast<volatile unsigned char*>(to)[i] = static_cast<const volatile unsigned char*>(from)[i];
  }
}

SIMT_UNTRACKED inline void release([[maybe_unused]] Clock& clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&clock);
#endif
}

SIMT_UNTRACKED inline void acquire([[maybe_unused]] Clock& clock) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&clock);
#endif
}

// ThreadSanitizer ignores allocations between these two.
SIMT_UNTRACKED inline void hide_writes() {
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}

SIMT_UNTRACKED inline void show_writes() {
#if defined(__SANITIZE_THREAD__)
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
}

SIMT_UNTRACKED inline unsigned random_below(unsigned bound) {
  uint64_t& state = engine().random_state;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((state >> 33) % bound);
}

SIMT_UNTRACKED inline void exchange(unsigned& a, unsigned& b) {  // not std::swap, which is tracked
  const unsigned old = a;
  a = b;
  b = old;
}

SIMT_UNTRACKED inline void step_forward() { __atomic_fetch_add(&engine().launch->events, 1, __ATOMIC_RELAXED); }

}  // namespace simt
