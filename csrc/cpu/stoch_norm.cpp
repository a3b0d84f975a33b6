// Stochastic normalisation on the CPU: how threads share the work, and the operators. The other files, from the inside
// out: activation.h, steps.h (what is done with a vector), loops.h (with memory), operation.h (forward and backward),
// layouts.h (with a range of channels).
#include "../stoch_norm.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "stoch_norm/layouts.h"
#include "stoch_norm/operation.h"
#include "tasks.h"

namespace talib_fast {
namespace {

// A thread takes a block of channels through both passes, where the values stay in its core's cache between the two.
// Where no such block is wide enough, or there are too few channels, all threads share the rows of all channels.
template <template <typename> class Layout, typename Op>
void walk(const Op& op) {
  constexpr int64_t kSize = sizeof(typename Op::Element), kTasks = 4;
  const ChannelView& view = op.call.view;
  const int64_t rows = Layout<Op>::rows(view), channels = view.channels, elements = view.per_channel() * channels;
  const int64_t threads = torch::stable::get_num_threads();
  const auto misaligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 != 0; };
  const bool stream = op.moved_tensors * elements * kSize > kSharedCache && !misaligned(op.tensors.out) &&
                      !misaligned(op.tensors.grad_residual);

  const int64_t narrowest = Layout<Op>::narrowest(view);
  const int64_t widest = Layout<Op>::widest(kOwnCache / (Op::kKept * view.per_channel() * kSize));
  // A block that does not fit the core's cache is worth it only if few threads are idle while the last ones are taken.
  const bool fits = Op::kKept * view.per_channel() * kSize <= kOwnCache;
  const int64_t rounds = ceil_div(channels, threads);
  // Maps in channels_last that stay in the cores' caches are best taken by rows, as other operators' threads took them.
  const bool resident = view.inner == 1 && Op::kKept * elements * kSize <= kOwnCache * threads;
  if (!resident && widest >= narrowest && channels >= threads && (fits || 5 * channels >= 4 * rounds * threads)) {
    int64_t width = std::clamp(ceil_div(channels, kTasks * threads), narrowest, widest);
    const int64_t lines = 64 / kSize / std::gcd(view.inner, 64 / kSize);  // so many channels are whole cache lines
    if (width > lines) width -= width % lines;
    for_each_task(ceil_div(channels, width), elements, [&](int64_t task) {
      const int64_t first = task * width, last = std::min(channels, first + width);
      Layout<Op> block(op, first, last, stream);
      std::vector<double> totals(2 * (last - first));
      block.sum(0, rows, totals.data());
      block.finish(first, last, totals.data());
      block.write(0, rows);
      settle(stream);
    });
    return;
  }

  const int64_t sharing = std::clamp<int64_t>(elements / 16384, 1, threads);
  const int64_t most = sharing * std::clamp<int64_t>(elements / (65536 * sharing), 1, kTasks);
  const int64_t together = Layout<Op>::together(view);
  const int64_t height = ceil_div(ceil_div(rows, most), together) * together, slices = ceil_div(rows, height);
  std::vector<double> totals(2 * channels * slices);
  Layout<Op> all(op, 0, channels, stream);
  for_each_task(slices, elements, [&](int64_t slice) {
    all.sum(slice * height, std::min(rows, (slice + 1) * height), &totals[2 * channels * slice]);
    settle(stream);
  });
  constexpr int64_t kChannels = 128, kCost = 64;  // finishing a channel takes as long as so many elements
  for_each_task(ceil_div(channels, kChannels), kCost * channels, [&](int64_t task) {
    const int64_t first = task * kChannels, last = std::min(channels, first + kChannels);
    for (int64_t slice = 1; slice < slices; ++slice)
      for (const int64_t begin : {first, channels + first})
        for (int64_t i = begin; i < begin + last - first; ++i) totals[i] += totals[2 * channels * slice + i];
    all.finish(first, last, totals.data());
  });
  const auto write = [&](int64_t slice) {
    all.write(slice * height, std::min(rows, (slice + 1) * height));
    settle(stream);
  };
  for_each_task(slices, elements, write, true);  // backwards: what was read last is still in the cache
}

template <typename Op>
void run(const Op& op) {
  constexpr int64_t kLongRun = 512;
  const ChannelView& view = op.call.view;
  const int64_t bytes = view.per_channel() * view.channels * sizeof(typename Op::Element);
  advise_huge_pages(op.tensors.out, bytes);
  if (op.tensors.grad_residual != nullptr && op.moved_tensors > 3) advise_huge_pages(op.tensors.grad_residual, bytes);
  if (view.inner >= kLongRun) walk<Runs>(op);
  else walk<Rows>(op);
}

struct Kernels {
  struct Guard {
    explicit Guard(int32_t) {}
  };

  static void forward(const ForwardCall& call) {
    if (call.batches != nullptr) ++*call.batches;
    with_type(float_type(call.input), [&](auto zero) {
      const Forward<decltype(zero)> op{call};
      op.clear_signs();
      if (call.input.numel() != 0) return run(op);
      for (int64_t c = 0; c < call.view.channels; ++c) {
        const double mean = load(call.running.mean, c), var = load(call.running.var, c);
        op.mean[c] = mean, op.rstd[c] = op.rstd_of(var);
        store(call.updated.mean, c, mean), store(call.updated.var, c, var);
      }
    });
  }

  static void backward(const BackwardCall& call) {
    with_type(float_type(call.input), [&](auto zero) {
      const Backward<decltype(zero)> op{call};
      if (call.input.numel() != 0) return run(op);
      std::fill_n(op.dweight, call.view.channels, 0);
      std::fill_n(op.dbias, call.view.channels, 0);
    });
  }
};

}  // namespace
}  // namespace talib_fast

STABLE_TORCH_LIBRARY_IMPL(talib_fast, CPU, m) {
  if (!talib_fast::processor_serves_kernels()) return;
  using Operators = talib_fast::Operators<talib_fast::Kernels>;
  m.impl("stoch_norm_forward", TORCH_BOX(&Operators::forward));
  m.impl("stoch_norm_functional", TORCH_BOX(&Operators::functional));
  m.impl("stoch_norm_backward", TORCH_BOX(&Operators::backward));
}
