// The two schedules, a kernel each.
#pragma once

#include "worker.cuh"

namespace talib_fast::stoch_norm {

template <typename Op, int V, bool kRows>
__global__ void __launch_bounds__(kMaxThreads, 1) resident_kernel(const Op op, const Geometry g) {
  using W = Worker<Op, V, kRows>;
  using Element = Packed<typename Op::Element, V>;
  SIMT_DYN_SHARED(unsigned char, shared);
  W worker(op, g, shared);
  worker.group = blockIdx.x;
  const int steps = static_cast<int>(g.steps);
  // a thread reads only what it put there itself: [steps of a thread, tensors, threads]
  Element* kept = reinterpret_cast<Element*>(shared + g.scratch_bytes) + threadIdx.x;

  worker.fetch(worker.group);
  bool uses_running_stats = false;
  if constexpr (W::kFirstPassNeedsConstants) {
    worker.share_initial_constants();
    __syncthreads();
    uses_running_stats = !kRows && !worker.operands[0].uses_batch_stats;
  }
  typename Op::Sums sums[W::kChannels];
  worker.sum(0, steps, uses_running_stats, sums, [&](const typename W::Values& values, int step) {
    kept[W::kTensors * step * blockDim.x] = values.x;
    if constexpr (W::kTensors == 2) kept[(2 * step + 1) * blockDim.x] = values.beside;
  });
  worker.reduce(sums, [&](int i, const typename Op::Sums& total) {
    worker.constants[i] = op.finish(worker.channel(i), worker.operands[i], total);
  });
  if (uses_running_stats || steps == 0) return;
  __syncthreads();

  typename Op::K constant[W::kChannels];
  worker.read_constants(worker.constants, constant);
  const auto load = [&](int64_t at, int step) {
    typename W::Values values;
    values.x = kept[W::kTensors * step * blockDim.x];
    if constexpr (W::kTensors == 2) values.beside = kept[(2 * step + 1) * blockDim.x];
    else worker.load_residual(at, values);
    return values;
  };
  worker.write_all(0, steps, load, constant);
}

// An item of the sliced schedule, one pass over one slice, by its place in the list. First passes are ahead of second
// ones by the slices of a group and `lag` more; from then on the two take turns. The second pass over a group begins
// with the slice that was read last.
struct Item {
  bool exists, first_pass;
  unsigned group, slice;

  __device__ __forceinline__ Item(unsigned ticket, const Geometry& g, unsigned lag) {
    const unsigned all = g.groups * g.slices, ahead = g.slices + lag;
    unsigned i = ticket;
    first_pass = i < ahead;
    if (!first_pass) {
      const unsigned turns = i - ahead, both = 2 * (all - ahead);
      first_pass = turns < both && turns % 2 == 1;
      i = turns >= both ? turns - both + all - ahead : first_pass ? ahead + turns / 2 : turns / 2;
    }
    exists = ticket < 2 * all;
    group = i / g.slices, slice = i - group * g.slices;
    if (!first_pass) slice = g.slices - 1 - slice;
  }
};

// What blocks share in global memory.
template <typename Op>
struct Workspace {
  typename Op::K* constants;    // [groups, group_channels]
  typename Op::Sums* slices;    // [groups, slices, group_channels]
  typename Op::Sums* sections;  // [groups, sections, group_channels], if there are several
  // counters, 0 before and after:
  unsigned* next_ticket;
  unsigned* arrived;           // [groups]: slices or sections summed, 1 for the constants, second passes begun
  unsigned* arrived_sections;  // [groups, sections], if there are several: slices summed
};

template <typename Op, int V, bool kRows>
__global__ void __launch_bounds__(kSlicedThreads, kBlocksPerMultiprocessor)
    sliced_kernel(const Op op, const Geometry g, const Workspace<Op> workspace, const unsigned lag) {
  using W = Worker<Op, V, kRows>;
  using Sums = typename Op::Sums;
  SIMT_DYN_SHARED(unsigned char, shared);
  SIMT_SHARED(unsigned, tickets, 2);  // drawn by thread 0: this item's and the next one's, in turns
  SIMT_SHARED(unsigned, before, 1);   // a counter, before thread 0 incremented it
  W worker(op, g, shared);
  // every block draws one ticket without an item, and the last of these sets the counter to 0 again
  const unsigned last_ticket = 2 * g.groups * g.slices + gridDim.x - 1;
  const unsigned arrivals = g.sections > 1 ? g.sections : g.slices;

  // Fetches what the next item needs, while other data are on their way. For a second pass that is the mask alone: a
  // block that finishes the group may still be writing the rest.
  const auto look_ahead = [&](unsigned ticket) {
    const Item item(ticket, g, lag);
    if (!item.exists) return;
    if (W::kFirstPassNeedsConstants && item.first_pass) worker.fetch(item.group);
    if (!kRows && !item.first_pass && worker.fetched_channel() == 0)
      worker.operands[0].uses_batch_stats = op.mask(item.group);
  };

  // Tickets need no memory order: data go from block to block by `arrived`.
  if (threadIdx.x == 0) tickets[0] = atomicInc(workspace.next_ticket, last_ticket);
  __syncthreads();
  look_ahead(tickets[0]);
  for (int turn = 0;; turn ^= 1) {
    __syncthreads();  // this item's data are in shared memory, and nobody reads the last one's any more
    const Item item(tickets[turn], g, lag);
    if (!item.exists) return;
    // A block holds its next ticket as well. An item waits for smaller tickets only, and a block takes its tickets in
    // order. So the smallest unfinished ticket is being worked on, and waits for nothing.
    unsigned next = 0;
    if (threadIdx.x == 0) next = atomicInc(workspace.next_ticket, last_ticket);
    const int64_t begin = item.slice * g.slice_steps, rest = g.steps - begin;
    const int count = static_cast<int>(rest < g.slice_steps ? rest : g.slice_steps);
    const bool uses_running_stats = !kRows && !worker.operands[0].uses_batch_stats;
    worker.group = item.group;
    typename Op::K* constants = workspace.constants + worker.group * g.group_channels;
    unsigned* arrived = workspace.arrived + item.group;
    const unsigned last_arrival = uses_running_stats ? arrivals - 1 : arrivals + g.slices;

    if (item.first_pass) {
      if constexpr (W::kFirstPassNeedsConstants) {
        worker.share_initial_constants();
        __syncthreads();
      }
      Sums sums[W::kChannels];
      worker.sum(begin, count, uses_running_stats, sums, [](const typename W::Values&, int) {});
      if (threadIdx.x == 0) tickets[turn ^ 1] = next;
      const Sums* partial = workspace.slices + worker.group * g.slices * g.group_channels;
      Sums* own = workspace.slices + (worker.group * g.slices + item.slice) * g.group_channels;
      worker.reduce(sums, [&](int i, const Sums& total) { own[i] = total; });
      __syncthreads();
      const unsigned section = g.sections > 1 ? item.slice / g.section_slices : 0;
      const unsigned first_slice = section * g.section_slices;
      unsigned parts = g.slices - first_slice < g.section_slices ? g.slices - first_slice : g.section_slices;
      unsigned* counter = arrived;
      if (g.sections > 1) counter = workspace.arrived_sections + uint64_t(item.group) * g.sections + section;
      if (threadIdx.x == 0) before[0] = increment_acquire_release(counter, g.sections > 1 ? parts - 1 : last_arrival);
      look_ahead(tickets[turn ^ 1]);
      __syncthreads();
      bool is_last = before[0] == parts - 1;  // which block that is makes no difference to the result
      if (is_last && g.sections > 1) {
        Sums* merged = workspace.sections + (worker.group * g.sections + section) * g.group_channels;
        worker.merge(partial + uint64_t(first_slice) * g.group_channels, parts,
                     [&](int i, const Sums& total) { merged[i] = total; });
        __syncthreads();
        if (threadIdx.x == 0) before[0] = increment_acquire_release(arrived, last_arrival);
        __syncthreads();
        partial = workspace.sections + worker.group * g.sections * g.group_channels, parts = g.sections;
        is_last = before[0] == parts - 1;
      }
      if (is_last) {
        worker.merge(partial, parts, [&](int i, const Sums& total) {
          const int64_t c = worker.channel(i);
          constants[i] = op.finish(c, op.fetch(c), total);
        });
        __syncthreads();
        if (threadIdx.x == 0 && !uses_running_stats) increment_release(arrived, last_arrival);
      }
    } else {
      if (threadIdx.x == 0) {
        if (!uses_running_stats) {
          wait_acquire(arrived, arrivals + 1);
          atomicInc(arrived, last_arrival);
        }
        tickets[turn ^ 1] = next;  // not earlier: it may still be on its way
      }
      __syncthreads();
      typename Op::K constant[W::kChannels] = {};
      if (!uses_running_stats) worker.read_constants(constants, constant);
      look_ahead(tickets[turn ^ 1]);
      const auto load = [&](int64_t at, int) {
        typename W::Values values;
        values.x = load_packed_last<V>(op.x + at);
        if constexpr (W::kTensors == 2) values.beside = load_packed<V>(op.gradient() + at);
        else worker.load_residual(at, values);
        return values;
      };
      if (!uses_running_stats) worker.write_all(begin, count, load, constant);
    }
  }
}

}  // namespace talib_fast::stoch_norm
