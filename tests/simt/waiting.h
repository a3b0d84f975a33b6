// Waiting of CUDA threads: for barriers, warp operations and other blocks.
#pragma once

#include "fibers.h"

namespace simt {

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

// Whether the predicate is true in any thread of the block.
SIMT_UNTRACKED inline bool barrier_or(bool predicate, At at) {
  bool& vote = engine().votes[engine().barriers % 2];
  vote = vote || predicate;
  barrier(at);
  return vote;
}

// Gives `bytes` of the calling lane's value to a warp operation and waits for all lanes of the mask.
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
  if (operation == Operation::kSync) {  // the only warp operation that orders memory
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

// `own`: the source lane is outside the segment, so the lane keeps its own value.
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

// Lets other threads and blocks continue. If no thread can release this one any more, that is a deadlock.
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

}  // namespace simt
