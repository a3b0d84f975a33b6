// Launches kernels: fibers for CUDA threads, what they wait for, shared memory, and blocks in flight.
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

// ThreadSanitizer shall see what kernels do, not how the harness runs them.
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
constexpr size_t kDefaultSharedBytes = 48 << 10;  // more needs cudaFuncSetAttribute

// To ThreadSanitizer a fiber is a thread, and what it learns in a block of what others did it knows for ever. Two sets
// of fibers take the blocks in turn, so that neighbouring blocks know nothing of each other.
constexpr unsigned kFiberSets = kThreadSanitizer ? 2 : 1;
constexpr unsigned kMaxTrackedThreads = 3 * kMaxThreads;  // it can tell 8000 apart

// Its address names a happens-before edge to ThreadSanitizer: from those who release it to those who acquire it later.
// The alignment matters: ThreadSanitizer keeps one clock for each 8 bytes.
struct alignas(16) Clock {
  char address;
};

struct Fiber {  // a machine stack that the processor can switch to
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
  Fiber* fiber;  // while it waits
};

enum class Operation { kShuffle, kVote, kSync };

struct Collective {  // a warp operation under way
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
  Clock sync_clock[kFiberSets][2];  // in turn, as the block's barrier_clock
};

struct Launch {  // what the blocks of a launch share
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
  unsigned events;  // steps forward that any block made: a thread returned or a barrier opened
};

struct SharedArray {
  const void* tag;
  void* memory;
};

struct Engine {  // runs one block at a time; plain data, at home in one operating-system thread
  Launch* launch;
  uint3 block_index;  // blockIdx
  unsigned fiber_set;
  uint64_t random_state;

  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Thread* self;  // the running one; null in the launcher
  unsigned thread_count, started, live;
  unsigned order[kMaxThreads];  // in which threads start

  unsigned ready[kMaxThreads], ready_head, ready_count;  // a ring of those that can go on
  unsigned at_barrier[kMaxThreads], at_barrier_count;
  At barrier_at;
  unsigned barriers;
  // A thread may reach the next barrier before another has left this one: that must not learn what the first did since.
  Clock barrier_clock[kFiberSets][2];
  bool votes[2];  // of __syncthreads_or, likewise
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

// Says where and aborts.
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

// Not memcpy, whose interceptor would show ThreadSanitizer the harness's own accesses.
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

// Allocations between these two are nobody's accesses.
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

// ------------------------------------------------------------------------------------------------------------- fibers

#if !defined(SIMT_USES_UCONTEXT)
// Saves the callee's registers on this stack and its pointer to *save, and goes on from `load`. `noipa` keeps GCC from
// concluding that nothing is clobbered.
__attribute__((naked, noipa, no_sanitize("address", "thread", "undefined"))) inline void switch_stack(void** /*save*/,
                                                                                                      void* /*load*/) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

SIMT_UNTRACKED inline void switch_to(Fiber* to) {
  Engine& e = engine();
  Fiber* from = e.current;
  if (from == to) {
    return;
  }
  e.current = to;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#endif
#if defined(SIMT_USES_UCONTEXT)
  swapcontext(&from->context, &to->context);
#else
  switch_stack(&from->stack_pointer, to->stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main();

SIMT_UNTRACKED inline void make_fiber(Fiber* fiber) {
  char* memory = static_cast<char*>(map_memory(kPageBytes + kStackBytes));
  mprotect(memory, kPageBytes, PROT_NONE);  // an overflow faults
  fiber->stack = memory + kPageBytes;
  fiber->stack_bytes = kStackBytes;
#if defined(SIMT_USES_UCONTEXT)
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = fiber->stack_bytes;
  makecontext(&fiber->context, fiber_main, 0);
#else
  void** top = reinterpret_cast<void**>(fiber->stack + fiber->stack_bytes);
  *--top = nullptr;  // the ABI's alignment at entry
  *--top = reinterpret_cast<void*>(&fiber_main);
  fiber->stack_pointer = top - 6;  // registers
#endif
#if defined(__SANITIZE_THREAD__)
  fiber->tsan_fiber = __tsan_create_fiber(0);
#endif
}

#if defined(__SANITIZE_THREAD__)
// To ThreadSanitizer fibers are threads, so that each CUDA thread has its own. The launcher makes them: a new one knows
// what its maker knows.
SIMT_UNTRACKED inline void make_fibers() {
  Engine& e = engine();
  for (unsigned thread = 0; thread < e.thread_count; ++thread) {
    Fiber* fiber = &e.fibers[e.fiber_set * kMaxThreads + thread];
    if (!fiber->stack) {
      make_fiber(fiber);
      char name[32];
      std::snprintf(name, sizeof name, "CUDA thread %u", thread);
      __tsan_set_fiber_name(fiber->tsan_fiber, name);
    }
  }
}

SIMT_UNTRACKED inline Fiber* fiber_for(unsigned thread) {
  return &engine().fibers[engine().fiber_set * kMaxThreads + thread];
}
#else
SIMT_UNTRACKED inline void make_fibers() {}

// Threads that never wait share a fiber, one after another.
SIMT_UNTRACKED inline Fiber* fiber_for(unsigned) {
  Engine& e = engine();
  if (e.idle_count) {
    return e.idle_fibers[--e.idle_count];
  }
  make_fiber(&e.fibers[e.fiber_count]);
  return &e.fibers[e.fiber_count++];
}
#endif

SIMT_UNTRACKED inline unsigned start_next() {
  Engine& e = engine();
  const unsigned thread = e.order[e.started++];
  e.self = &e.threads[thread];
  return thread;
}

SIMT_UNTRACKED inline void make_ready(unsigned thread) {
  Engine& e = engine();
  e.ready[(e.ready_head + e.ready_count++) % kMaxThreads] = thread;
}

// Leaves the running thread, which waits or has returned, for another one or for the launcher.
SIMT_UNTRACKED inline void dispatch() {
  Engine& e = engine();
  if (e.ready_count && (e.started == e.thread_count || !e.random_state || random_below(2))) {
    unsigned& first = e.ready[e.ready_head];
    if (e.random_state) {
      exchange(first, e.ready[(e.ready_head + random_below(e.ready_count)) % kMaxThreads]);
    }
    e.self = &e.threads[first];
    e.ready_head = (e.ready_head + 1) % kMaxThreads;
    --e.ready_count;
    switch_to(e.self->fiber);
  } else if (e.started < e.thread_count) {
    const unsigned thread = start_next();
    switch_to(fiber_for(thread));
  } else {
    e.self = nullptr;
    switch_to(&e.launcher);
  }
}

SIMT_UNTRACKED inline void wait() {
  Engine& e = engine();
  e.self->fiber = e.current;
  dispatch();
}

SIMT_UNTRACKED inline void wake_lanes(unsigned warp, unsigned lanes) {
  for (; lanes; lanes &= lanes - 1) {
    make_ready(warp * kWarpSize + static_cast<unsigned>(std::countr_zero(lanes)));
  }
}

SIMT_UNTRACKED inline void open_barrier() {
  Engine& e = engine();
  for (unsigned i = 0; i < e.at_barrier_count; ++i) {
    make_ready(e.at_barrier[i]);
  }
  e.at_barrier_count = 0;
  ++e.barriers;
  e.votes[e.barriers % 2] = false;
  step_forward();
}

SIMT_UNTRACKED inline bool try_complete(Warp& warp, Collective* c) {
  if (c->arrived != (c->mask & warp.live)) {
    return false;
  }
  c->readers = static_cast<unsigned>(std::popcount(c->arrived));
  for (unsigned i = 0; i < warp.pending_count; ++i) {
    if (warp.pending[i] == c) {
      warp.pending[i] = warp.pending[--warp.pending_count];
      break;
    }
  }
  return true;
}

// A thread that returned no longer holds up its warp or its block.
SIMT_UNTRACKED inline void finish_thread() {
  Engine& e = engine();
  release(e.end_clock);
  Warp& warp = e.warps[e.self->warp];
  warp.live &= ~(1u << e.self->lane);
  --e.live;
  step_forward();
  for (unsigned i = 0; i < warp.pending_count;) {
    Collective* c = warp.pending[i];
    if (try_complete(warp, c)) {
      wake_lanes(e.self->warp, c->arrived);
    } else {
      ++i;
    }
  }
  if (e.live && e.at_barrier_count == e.live) {
    open_barrier();
  }
}

SIMT_UNTRACKED inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    Engine& e = engine();
    for (;;) {
      acquire(e.begin_clock);
      e.launch->call(e.launch->call_data);
      finish_thread();
      if (kThreadSanitizer || e.started == e.thread_count) {
        break;
      }
      start_next();
    }
    if (!kThreadSanitizer) {
      e.idle_fibers[e.idle_count++] = e.current;
    }
    dispatch();
  }
}

// ------------------------------------------------------------------------------------------------------------ waiting

SIMT_UNTRACKED inline bool same_place(At a, At b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

SIMT_UNTRACKED inline void barrier(At at) {
  Engine& e = engine();
  if (!e.at_barrier_count) {
    e.barrier_at = at;
  } else if (!same_place(e.barrier_at, at)) {
    die(at, "divergent __syncthreads: other threads wait at %s:%u, this one", e.barrier_at.file_name(),
        static_cast<unsigned>(e.barrier_at.line()));
  }
  Clock& clock = e.barrier_clock[e.fiber_set][e.barriers % 2];
  release(clock);
  e.at_barrier[e.at_barrier_count++] = static_cast<unsigned>(e.self - e.threads);
  if (e.at_barrier_count == e.live) {
    open_barrier();
  }
  wait();
  acquire(clock);
}

// Whether any thread of the block came with a predicate that holds.
SIMT_UNTRACKED inline bool barrier_or(bool predicate, At at) {
  bool& vote = engine().votes[engine().barriers % 2];
  vote = vote || predicate;
  barrier(at);
  return vote;
}

// Brings `bytes` of the calling lane's value to a warp operation and waits for all lanes of the mask.
SIMT_UNTRACKED inline Collective* collect(unsigned mask, Operation operation, const void* value, size_t bytes, At at) {
  Engine& e = engine();
  const Thread& thread = *e.self;
  const unsigned own = 1u << thread.lane;
  if (!(mask & own)) {
    die(at, "warp operation whose mask %08x leaves out the calling lane %u", mask, thread.lane);
  }
  Warp& warp = e.warps[thread.warp];
  Collective* c = nullptr;
  for (unsigned i = 0; i < warp.pending_count; ++i) {
    if (warp.pending[i]->mask == mask) {
      c = warp.pending[i];
    }
  }
  if (!c) {
    if (warp.pending_count == kWarpSize) {
      die(at, "more than %u warp operations at once", kWarpSize);
    }
    c = e.free_collectives;
    if (c) {
      e.free_collectives = c->next_free;
    } else {
      c = &e.collectives[e.collective_count++];
    }
    c->operation = operation;
    c->mask = mask;
    c->arrived = 0;
    c->at = at;
    if (operation == Operation::kSync) {
      c->clock = &warp.sync_clock[e.fiber_set][warp.syncs++ % 2];
    }
    warp.pending[warp.pending_count++] = c;
  }
  if (c->operation != operation || !same_place(c->at, at)) {
    die(at, "lanes of a warp are at different warp operations: others wait at %s:%u, this one", c->at.file_name(),
        static_cast<unsigned>(c->at.line()));
  }
  copy_bytes(c->value[thread.lane], value, bytes);
  if (operation == Operation::kSync) {  // alone among warp operations it orders memory
    release(*c->clock);
  }
  c->arrived |= own;
  if (try_complete(warp, c)) {
    wake_lanes(thread.warp, c->arrived & ~own);
  } else {
    wait();
  }
  if (operation == Operation::kSync) {
    acquire(*c->clock);
  }
  return c;
}

SIMT_UNTRACKED inline void leave(Collective* c) {
  if (--c->readers == 0) {
    c->next_free = engine().free_collectives;
    engine().free_collectives = c;
  }
}

// `own`: the source is beyond the segment, and the lane keeps its value.
template <typename T>
SIMT_UNTRACKED T shuffle(unsigned mask, T value, unsigned source, bool own, At at) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Collective* c = collect(mask, Operation::kShuffle, &value, sizeof(value), at);
  if (!own) {
    if (!(c->arrived >> source & 1)) {
      die(at, "shuffle reads lane %u, which takes no part (mask %08x, present %08x),", source, c->mask, c->arrived);
    }
    copy_bytes(&value, c->value[source], sizeof(value));
  }
  leave(c);
  return value;
}

SIMT_UNTRACKED inline unsigned ballot(unsigned mask, bool predicate, At at) {
  Collective* c = collect(mask, Operation::kVote, &predicate, sizeof(predicate), at);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    votes |= static_cast<unsigned>((c->arrived >> lane & 1) && c->value[lane][0]) << lane;
  }
  leave(c);
  return votes;
}

// Lets other threads and blocks go on; a thread that nobody can release any more is a deadlock.
SIMT_UNTRACKED inline void pause(At at = At::current()) {
  constexpr unsigned kAloneLimit = 1'000'000, kCompanyLimit = 200'000, kBusyPauses = 1000;
  Engine& e = engine();
  Launch& launch = *e.launch;
  const unsigned events = __atomic_load_n(&launch.events, __ATOMIC_RELAXED);
  if (events != e.events_seen) {
    e.events_seen = events;
    e.pauses = 0;
  }
  const bool alone = __atomic_load_n(&launch.engines_running, __ATOMIC_RELAXED) == 1;
  if (++e.pauses > (alone ? kAloneLimit : kCompanyLimit)) {
    die(at, "deadlock: after %u pauses with no step forward in any of %u blocks in flight, waiting", e.pauses,
        launch.blocks_in_flight);
  }
  if (!alone) {
    if (e.pauses > kBusyPauses) {
      const timespec moment{0, 50'000};
      nanosleep(&moment, nullptr);
    } else {
      sched_yield();
    }
  }
  make_ready(static_cast<unsigned>(e.self - e.threads));
  wait();
}

// ----------------------------------------------------------------------------------------------------- shared memory

inline char dynamic_tag;  // one array, by whatever names a kernel calls it

// The running block's array of that tag, at first full of NaN.
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

// ------------------------------------------------------------------------------------------------------------- launch

[[noreturn]] SIMT_UNTRACKED inline void report_deadlock(At at) {
  const Engine& e = engine();
  for (const Warp& warp : e.warps) {
    for (unsigned i = 0; i < warp.pending_count; ++i) {
      const Collective* c = warp.pending[i];
      std::fprintf(stderr, "simt: warp %d: lanes %08x wait for lanes %08x at %s:%u\n",
                   static_cast<int>(&warp - e.warps), c->arrived, c->mask & warp.live & ~c->arrived, c->at.file_name(),
                   static_cast<unsigned>(c->at.line()));
    }
  }
  if (e.at_barrier_count) {
    std::fprintf(stderr, "simt: %u threads wait in __syncthreads at %s:%u\n", e.at_barrier_count,
                 e.barrier_at.file_name(), static_cast<unsigned>(e.barrier_at.line()));
  }
  die(at, "deadlock: %u of %u threads wait for ever; launched", e.live, e.thread_count);
}

SIMT_UNTRACKED inline void run_block(uint64_t number, At at) {
  Engine& e = engine();
  const Launch& launch = *e.launch;
  e.block_index = {static_cast<unsigned>(number % launch.grid.x),
                   static_cast<unsigned>(number / launch.grid.x % launch.grid.y),
                   static_cast<unsigned>(number / launch.grid.x / launch.grid.y)};
  e.fiber_set = (e.fiber_set + 1) % kFiberSets;
  make_fibers();
  e.random_state = launch.seed ? launch.seed * 0x9e3779b97f4a7c15u + number * 2 + 1 : 0;
  for (unsigned i = 0; i < e.thread_count; ++i) {
    e.order[i] = i;
  }
  if (e.random_state) {
    for (unsigned i = e.thread_count; i > 1; --i) {
      exchange(e.order[i - 1], e.order[random_below(i)]);
    }
    for (unsigned i = launch.blocks_in_flight > 1 ? random_below(64) : 0; i; --i) {
      sched_yield();
    }
  }
  for (unsigned w = 0; w * kWarpSize < e.thread_count; ++w) {
    const unsigned lanes = e.thread_count - w * kWarpSize;
    e.warps[w].live = lanes >= kWarpSize ? ~0u : (1u << lanes) - 1;
  }
  e.votes[e.barriers % 2] = false;
  e.started = 0;
  e.live = e.thread_count;
  step_forward();
  dispatch();
  if (e.live) {
    report_deadlock(at);
  }
  free_shared_arrays();
}

// Runs blocks, in the launch's order, until none is left.
SIMT_UNTRACKED inline void run_blocks(Launch& launch, At at) {
  Engine& e = engine();
  if (e.launch) {
    die(at, "a kernel launches a kernel");
  }
  e.launch = &launch;
  e.current = &e.launcher;
#if defined(__SANITIZE_ADDRESS__)
  if (!e.launcher.stack) {
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &e.launcher.stack_bytes);
    pthread_attr_destroy(&attributes);
    e.launcher.stack = static_cast<char*>(stack);
  }
#endif
#if defined(__SANITIZE_THREAD__)
  e.launcher.tsan_fiber = __tsan_get_current_fiber();
#endif
  const dim3 block = launch.block;
  e.thread_count = block.x * block.y * block.z;
  for (unsigned i = 0; i < e.thread_count; ++i) {
    Thread& thread = e.threads[i];
    thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    thread.lane = i % kWarpSize;
    thread.warp = i / kWarpSize;
  }
  release(e.begin_clock);
  for (;;) {
    const uint64_t number = __atomic_fetch_add(&launch.next_block, 1, __ATOMIC_RELAXED);
    if (number >= launch.block_count) {
      break;
    }
    run_block(number, at);
  }
  acquire(e.end_clock);
  e.launch = nullptr;
  __atomic_fetch_sub(&launch.engines_running, 1, __ATOMIC_RELAXED);
}

// The operating-system threads of the blocks in flight beside the launcher's own. They live as long as the process.
class Crew {
 public:
  static Crew& instance() {
    static Crew* crew = new Crew;
    return *crew;
  }

  // Runs the launch on `helpers` threads of the crew and on the calling one.
  void run(Launch& launch, unsigned helpers, At at) {
    std::lock_guard turn(turn_);
    {
      std::lock_guard lock(mutex_);
      launch_ = &launch;
      at_ = at;
      wanted_ = busy_ = helpers;
      ++number_;
      for (; size_ < helpers; ++size_) {
        std::thread(&Crew::serve, this, size_, number_ - 1).detach();
      }
    }
    work_.notify_all();
    run_blocks(launch, at);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void serve(unsigned rank, uint64_t served) {
    for (;;) {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [&] { return number_ != served; });
      served = number_;
      if (rank >= wanted_) {
        continue;
      }
      Launch& launch = *launch_;
      const At at = at_;
      lock.unlock();
      run_blocks(launch, at);
      lock.lock();
      if (--busy_ == 0) {
        done_.notify_one();
      }
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable work_, done_;
  Launch* launch_ = nullptr;
  At at_;
  unsigned size_ = 0, wanted_ = 0, busy_ = 0;
  uint64_t number_ = 0;
};

// Dynamic shared memory that kernels were allowed by cudaFuncSetAttribute.
class SharedMemoryGrants {
 public:
  static SharedMemoryGrants& instance() {
    static SharedMemoryGrants grants;
    return grants;
  }
  void set(const void* kernel, size_t bytes, At at) {
    std::lock_guard lock(mutex_);
    size_t& granted = bytes_.try_emplace(kernel, 0).first->second;
    if (bytes < granted) {
      die(at, "a kernel's %zu bytes of dynamic shared memory are lowered to %zu, which other launches may not expect,",
          granted, bytes);
    }
    granted = bytes;
  }
  size_t get(const void* kernel) {
    std::lock_guard lock(mutex_);
    const auto found = bytes_.find(kernel);
    return found == bytes_.end() ? kDefaultSharedBytes : found->second;
  }

 private:
  std::mutex mutex_;
  std::map<const void*, size_t> bytes_;
};

// The one stream that there is: none, nullptr, would hide that a caller forgot to say which.
inline CUstream_st* current_stream() {
  static char stream;
  return reinterpret_cast<CUstream_st*>(&stream);
}

inline void check_stream(cudaStream_t stream, const char* what, At at) {
  if (stream != current_stream()) {
    die(at, "%s goes to another stream than the current one,", what);
  }
}

inline int driver_version = 0;  // as it was told to a caller who asked

inline size_t shared_limit() { return setting("SIMT_SHARED_BYTES", kDefaultSharedBytes); }

// A line of SIMT_LOG's file: the launch's size, and the kernel by its place in the library that has it, where `nm` knows
// it by name and with its template arguments.
inline void log(const Launch& launch, At at) {
  const char* name = std::getenv("SIMT_LOG");
  if (!name || !*name) {
    return;
  }
  Dl_info library{};
  std::FILE* file = std::fopen(name, "a");
  if (!file || !dladdr(launch.kernel, &library)) {
    die(at, "can't write of a launch to SIMT_LOG=%s,", name);
  }
  const dim3 grid = launch.grid, block = launch.block;
  const auto place = reinterpret_cast<uintptr_t>(launch.kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
  std::fprintf(file, "%u\t%u\t%zu\t%zx\t%s\n", grid.x * grid.y * grid.z, block.x * block.y * block.z,
               launch.dynamic_bytes, static_cast<size_t>(place), library.dli_fname);
  std::fclose(file);
}

inline void run(Launch& launch, At at) {
  const dim3 grid = launch.grid, block = launch.block;
  constexpr uint64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 0xffff;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    die(at, "launch of %s with a grid of (%u,%u,%u)", launch.kernel_name, grid.x, grid.y, grid.z);
  }
  if (!threads || threads > kMaxThreads || block.z > 64) {
    die(at, "launch of %s with a block of (%u,%u,%u)", launch.kernel_name, block.x, block.y, block.z);
  }
  launch.shared_limit = shared_limit();
  const size_t granted = SharedMemoryGrants::instance().get(launch.kernel);
  if (launch.dynamic_bytes > granted || launch.dynamic_bytes > launch.shared_limit) {
    die(at, "launch of %s with %zu bytes of dynamic shared memory: the kernel is allowed %zu, the device has %zu,",
        launch.kernel_name, launch.dynamic_bytes, granted, launch.shared_limit);
  }
  log(launch, at);
  launch.seed = setting("SIMT_SEED", 0);
  launch.block_count = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t in_flight = setting("SIMT_BLOCKS", 1);
  launch.blocks_in_flight = static_cast<unsigned>(std::clamp<uint64_t>(in_flight, 1, launch.block_count));
  launch.engines_running = launch.blocks_in_flight;
  if (kThreadSanitizer && launch.blocks_in_flight * threads > kMaxTrackedThreads) {
    die(at, "launch of %s: ThreadSanitizer has room for %u threads in flight, not %u blocks of %u,", launch.kernel_name,
        kMaxTrackedThreads, launch.blocks_in_flight, static_cast<unsigned>(threads));
  }
  if (launch.blocks_in_flight == 1) {
    run_blocks(launch, at);
  } else {
    Crew::instance().run(launch, launch.blocks_in_flight - 1, at);
  }
}

template <typename... Parameters, typename... Arguments>
void launch(At at, const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  check_stream(stream, name, at);
  constexpr size_t kParameters = sizeof(call.arguments), kMostParameters = 32764, kAlwaysAllowed = 4096;
  static_assert(kParameters <= kMostParameters);
  if (kParameters > kAlwaysAllowed && driver_version < 12010) {
    die(at, "launch of %s with %zu bytes of parameters, for which the driver's version was not asked or is too old,",
        name, kParameters);
  }
  Launch launch{};
  launch.kernel_name = name;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.grid = grid;
  launch.block = block;
  launch.dynamic_bytes = dynamic_bytes;
  launch.call = [](void* pointer) {
    const Call& call = *static_cast<const Call*>(pointer);
    [&]<size_t... i>(std::index_sequence<i...>) {
      call.kernel(std::get<i>(call.arguments)...);
    }(std::index_sequence_for<Parameters...>());
  };
  launch.call_data = &call;
  run(launch, at);
}

}  // namespace simt
