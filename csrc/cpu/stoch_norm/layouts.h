// Two ways to walk a range of channels. Both cut it into rows that do not depend on each other. They add sums over rows
// to `totals` (all channels' first sums, then their second ones), derive the constants and write rows.
#pragma once

#include "loops.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace talib_fast {
namespace {

// Long runs: a row is one piece of the run of every channel, in one image.
template <typename Op>
class Runs {
  using A = typename Op::A;
  using T = typename Op::Element;

 public:
  static int64_t rows(const ChannelView& view) { return view.outer * pieces(view); }
  static int64_t together(const ChannelView&) { return 1; }  // rows that a task should take together
  // blocks of channels: one is always worth it, even where it does not fit
  static int64_t narrowest(const ChannelView&) { return 1; }
  static int64_t widest(int64_t fitting) { return std::max<int64_t>(fitting, 1); }

  Runs(const Op& op, int64_t first, int64_t last, bool stream)
      : op_(op), first_(first), last_(last), stream_(stream), begun_(op.begin(first, last)), constants_(last - first) {
    for (int64_t c = first; c < last; ++c)
      if (op.uses_running_stats(c)) constants_[c - first] = op.running_constants(c);
  }

  void sum(int64_t begin, int64_t end, double* totals) const {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = first_; c < last_; ++c) {
        const auto [at, n] = piece(row, c);
        op_.summing([&, at = at, n = n](const auto& step) {
          simd<SumRun>(step, at, n, begun_[c - first_], &totals[c - first_], &totals[last_ - first_ + c - first_]);
        });
        if (op_.uses_running_stats(c))
          op_.writing_running(
              [&, at = at, n = n](const auto& step) { simd<WriteRun>(step, at, n, constants_[c - first_], stream_); });
      }
  }

  void finish(int64_t begin, int64_t end, const double* totals) {
    for (int64_t c = begin; c < end; ++c)
      constants_[c - first_] =
          op_.finish(c, totals[c - first_], totals[last_ - first_ + c - first_], begun_[c - first_].center);
  }

  void write(int64_t begin, int64_t end) const {
    for (int64_t row = end; row-- > begin;)  // what was read last is still in the cache
      for (int64_t c = last_; c-- > first_;) {
        if (op_.uses_running_stats(c)) continue;
        const auto [at, n] = piece(row, c);
        op_.writing(
            [&, at = at, n = n](const auto& step) { simd<WriteRun>(step, at, n, constants_[c - first_], stream_); });
      }
  }

 private:
  static constexpr int64_t kPiece = 4096;  // summed in the accumulation dtype before the sum goes into a double
  static int64_t pieces(const ChannelView& view) { return ceil_div(view.inner, kPiece); }

  std::pair<int64_t, int64_t> piece(int64_t row, int64_t c) const {
    const auto [outer, channels, inner] = op_.call.view;
    const int64_t count = pieces(op_.call.view), begin = row % count * kPiece;
    return {(row / count * channels + c) * inner + begin, std::min(kPiece, inner - begin)};
  }
  const Op& op_;
  int64_t first_, last_;
  bool stream_;
  std::vector<Constants<A>> begun_, constants_;  // of the first pass and of the second one
};

// Short runs, channels_last among them: a row has `inner` columns a channel. Where rows are narrow and would not fill
// their vectors, several are taken as one, with as many copies of each channel.
template <typename Op>
class Rows {
  using A = typename Op::A;
  using T = typename Op::Element;

 public:
  static int64_t rows(const ChannelView& view) { return view.outer; }
  static int64_t together(const ChannelView& view) {
    constexpr int64_t kWidest = 4096;
    const int64_t row = view.channels * view.inner;
    int64_t count = kLanes<T> / std::gcd(row, kLanes<T>);
    if (count * row < 2 * kLanes<T>) count *= 2;
    return count * row <= kWidest && 4 * count <= view.outer ? count : 1;  // or it would not be worth the copies
  }
  // shorter pieces of a row waste what memory delivers around them
  static int64_t narrowest(const ChannelView& view) { return std::min(view.channels, ceil_div(256, view.inner)); }
  static int64_t widest(int64_t fitting) { return fitting; }

  Rows(const Op& op, int64_t first, int64_t last, bool stream)
      : op_(op),
        first_(first),
        last_(last),
        stream_(stream),
        together_(last - first == op.call.view.channels ? together(op.call.view) : 1),
        row_((last - first) * op.call.view.inner),
        width_(ceil_div(together_ * row_, kLanes<T>) * kLanes<T>),
        constants_(std::make_unique_for_overwrite<A[]>(5 * width_)) {
    for (int which = 0; which < 5; ++which)
      std::fill_n(constants_.get() + which * width_ + together_ * row_, width_ - together_ * row_, A(0));  // padding
    const std::vector<Constants<A>> constants = op.begin(first, last);
    for (int64_t c = first; c < last; ++c) spread(0, op.begun(), c, constants[c - first]);
    repeat(0, op.begun(), first, last);
  }

  void sum(int64_t begin, int64_t end, double* totals) const {
    const int64_t most = 256 * together_;  // summed in the accumulation dtype before the sums go into doubles
    const auto sums = std::make_unique_for_overwrite<A[]>(2 * width_);
    for (int64_t row = begin; row < end; row += most) {
      std::fill_n(sums.get(), 2 * width_, A(0));
      for_each_height(row, std::min(end, row + most), [&](int64_t at, int64_t rows, int64_t count) {
        op_.summing([&](const auto& step) {
          simd<SumRows>(step, at, rows, count * stride(), count * row_, constants_.get(), width_, sums.get());
        });
      });
      for (int which = 0; which < 2; ++which)
        add_columns<T>(sums.get() + which * width_, together_, last_ - first_, op_.call.view.inner,
                       totals + which * (last_ - first_));
    }
  }

  void finish(int64_t begin, int64_t end, const double* totals) {
    for (int64_t c = begin; c < end; ++c) {
      const A center = constants_[(c - first_) * op_.call.view.inner];
      spread(Op::kDone[0], Op::kDone[1], c,
             op_.finish(c, totals[c - first_], totals[last_ - first_ + c - first_], center));
    }
    repeat(Op::kDone[0], Op::kDone[1], begin, end);
  }

  void write(int64_t begin, int64_t end) const {
    for_each_height(begin, end, [&](int64_t at, int64_t rows, int64_t count) {
      const int64_t distance = count * stride();
      const bool aligned = at * sizeof(T) % 64 == 0 && distance * sizeof(T) % 64 == 0;
      op_.writing([&](const auto& step) {
        simd<WriteRows>(step, at, rows, distance, count * row_, constants_.get(), width_, stream_ && aligned);
      });
    });
  }

 private:
  int64_t stride() const { return op_.call.view.channels * op_.call.view.inner; }
  int64_t address(int64_t row) const { return row * stride() + first_ * op_.call.view.inner; }
  // of constants [from, to)
  void spread(int from, int to, int64_t c, const Constants<A>& constants) {
    const int64_t inner = op_.call.view.inner;
    const A values[] = {constants.center, constants.scale, constants.bias, constants.slope, constants.offset};
    for (int which = from; which < to; ++which)
      std::fill_n(constants_.get() + which * width_ + (c - first_) * inner, inner, values[which]);
  }
  // and for the copies of channels [begin, end)
  void repeat(int from, int to, int64_t begin, int64_t end) {
    const int64_t inner = op_.call.view.inner;
    for (int which = from; which < to; ++which)
      for (int64_t copy = 1; copy < together_; ++copy) {
        A* const original = constants_.get() + which * width_ + (begin - first_) * inner;
        std::copy_n(original, (end - begin) * inner, original + copy * row_);
      }
  }
  // f(address, rows, how many are one) for those that go together and for the rest
  template <typename F>
  void for_each_height(int64_t begin, int64_t end, const F& f) const {
    const int64_t rows = (end - begin) / together_, rest = (end - begin) % together_;
    if (rows > 0) f(address(begin), rows, together_);
    if (rest > 0) f(address(end - rest), rest, 1);
  }

  const Op& op_;
  int64_t first_, last_;
  bool stream_;
  int64_t together_, row_, width_;
  std::unique_ptr<A[]> constants_;  // [center, scale, bias, slope, offset] x columns, which are padded to whole vectors
};

}  // namespace
}  // namespace talib_fast
