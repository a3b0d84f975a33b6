// CUDA threads as fibers: how they are created, switched and ended.
#pragma once

#include "engine.h"

namespace simt {

#if !defined(SIMT_USES_UCONTEXT)
// Saves the callee-saved registers on this stack and the stack pointer to *save, and continues at `load`. `noipa` keeps
// GCC from assuming that no register is clobbered.
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
  mprotect(memory, kPageBytes, PROT_NONE);  // a stack overflow causes a segmentation fault
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
// For ThreadSanitizer fibers are threads, so each CUDA thread has a fiber of its own. The launcher creates them, since
// a new fiber is ordered after everything that its creator did.
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

// Switches from the running thread, which waits or has returned, to another thread or to the launcher.
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

// The warp and the block of a thread that returned no longer wait for it.
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

}  // namespace simt
