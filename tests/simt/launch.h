// Launches: the running blocks, the operating-system threads that run them, and the limits of a launch.
#pragma once

#include "fibers.h"
#include "shared_memory.h"
#include "waiting.h"

namespace simt {

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

// Runs blocks in the order of the launch until none is left.
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

// The operating-system threads that run blocks beside the launcher's own thread. They live as long as the process.
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

// The dynamic shared memory that cudaFuncSetAttribute allowed for each kernel.
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

// The only stream. It is not nullptr, so that a caller that forgets to pass its stream is found.
inline CUstream_st* current_stream() {
  static char stream;
  return reinterpret_cast<CUstream_st*>(&stream);
}

inline void check_stream(cudaStream_t stream, const char* what, At at) {
  if (stream != current_stream()) {
    die(at, "%s goes to another stream than the current one,", what);
  }
}

inline int driver_version = 0;  // the version that was reported to a caller

inline size_t shared_limit() { return setting("SIMT_SHARED_BYTES", kDefaultSharedBytes); }

// Writes a line to SIMT_LOG's file: the size of the launch, and the kernel as its offset in its library, for which `nm`
// gives the name with template arguments.
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
