// What an observer does with a batch, on the CPU: take it into the range and into the bins.
//
//   formula   numerics/histogram.h
//   layout    a tensor is one row of bins; per channel each channel is a row
//   who       per tensor threads share the elements, each with counters of its own; per channel they share the rows
//   bytes     4 an element while the bins hold the batch: it is counted on the chance that they do. Else, and per
//             channel, the range takes a pass of its own
//   numerics  exact: the state does not depend on threads, nor on the order of the batches
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../numerics/histogram.h"
#include "histogram_loops.h"
#include "observed_values.h"

namespace quantkern::cpu {
namespace {

struct State {
  float *low, *high;
  int64_t *counts, *exponent, *origin, *batches, *spoiled;
  int64_t rows, bins;

  BinGrid grid(int64_t row) const { return {exponent[row], origin[row]}; }

  // The range after a batch, and the bins that hold it.
  void widen(int64_t row, const Range& range) const {
    low[row] = min_lane(range.min, low[row]);
    high[row] = max_lane(range.max, high[row]);
    const BinGrid from = grid(row), to = grid_for(low[row], high[row], bins, exponent[row]);
    if (to == from) return;
    int64_t* own = counts + row * bins;
    const std::vector<int64_t> old(own, own + bins);
    std::fill(own, own + bins, 0);
    for (int64_t i = 0; i < bins; ++i)
      if (old[i]) own[std::clamp<int64_t>(merged_bin(i, from, to), 0, bins - 1)] += old[i];
    exponent[row] = to.exponent;
    origin[row] = to.origin;
  }

  void add(int64_t row, const std::vector<uint32_t>& counters) const {
    int64_t* own = counts + row * bins;
    for (int64_t i = 0; i < bins; ++i)
      for (int64_t k = 0; k < kCounters; ++k) own[i] += counters[kCounters * i + k];
  }
};

constexpr int64_t kBatchStretch = 16384;

// Counts a whole tensor; false, and nothing changed, when a value lies outside the bins.
bool count_tensor(const Values& x, const State& state) {
  const BinGrid grid = state.grid(0);
  const int64_t threads = at::get_num_threads(), stretches = (x.layout.inner + kBatchStretch - 1) / kBatchStretch;
  std::vector<std::vector<uint32_t>> counters(threads);
  std::vector<Range> ranges(threads, empty_range());
  std::atomic<bool> inside{true};
  at::parallel_for(0, stretches, kGrain / kBatchStretch, [&](int64_t first, int64_t last) {
    auto& own = counters[at::get_thread_num()];
    own.resize(kCounters * state.bins);
    for (int64_t s = first; s < last && inside; ++s) {
      const int64_t begin = s * kBatchStretch, end = std::min(x.layout.inner, begin + kBatchStretch);
      if (!histogram_loops().count(x.dtype, x.data, begin, end, grid.inverse(), static_cast<float>(grid.origin),
                                   state.bins, own.data(), ranges[at::get_thread_num()]))
        inside = false;
    }
  });
  if (!inside) return false;
  Range range = empty_range();
  for (int64_t t = 0; t < threads; ++t) {
    if (counters[t].empty()) continue;
    state.add(0, counters[t]);
    range = merge(range, ranges[t]);
  }
  state.widen(0, range);
  return true;
}

bool observe_tensor(const Values& x, const State& state) {
  if (count_tensor(x, state)) return true;
  Range range = empty_range();
  if (!tensor_range(x, range)) return false;
  state.widen(0, range);
  TORCH_INTERNAL_ASSERT(count_tensor(x, state));
  return true;
}

bool observe_rows(const Values& x, const State& state) {
  std::vector<Range> ranges(state.rows, empty_range());
  if (!row_ranges(x, ranges)) return false;
  const int64_t grain = std::max<int64_t>(1, kGrain / (x.layout.outer * x.layout.inner));
  at::parallel_for(0, state.rows, grain, [&](int64_t first, int64_t last) {
    std::vector<uint32_t> counters;
    for (int64_t row = first; row < last; ++row) {
      state.widen(row, ranges[row]);
      counters.assign(kCounters * state.bins, 0);
      const BinGrid grid = state.grid(row);
      x.every_stretch(row, [&](int64_t begin, int64_t end) {
        return histogram_loops().count(x.dtype, x.data, begin, end, grid.inverse(), static_cast<float>(grid.origin),
                                       state.bins, counters.data(), ranges[row]);
      });
      state.add(row, counters);
    }
  });
  return true;
}

void observe_histogram_cpu(const at::Tensor& x, std::optional<int64_t> axis, at::Tensor& low, at::Tensor& high,
                           at::Tensor& counts, at::Tensor& exponent, at::Tensor& origin, at::Tensor& batches,
                           at::Tensor& spoiled) {
  check_input(x);
  axis = check_axis(x, axis);
  check_state(low, x, axis, at::kFloat, "low");
  check_state(high, x, axis, at::kFloat, "high");
  const int64_t rows = low.numel();
  TORCH_CHECK_VALUE(counts.dim() == 2 && counts.size(1) > 2 && counts.size(1) <= 1 << 16,
                    "counts must be [rows, bins] with 3 to 65536 bins, got shape ", counts.sizes());
  check_counts(counts, {rows, counts.size(1)}, at::kLong, "counts");
  check_counts(exponent, {rows}, at::kLong, "exponent");
  check_counts(origin, {rows}, at::kLong, "origin");
  check_counts(batches, {}, at::kLong, "batches");
  check_counts(spoiled, {}, at::kLong, "spoiled");
  if (x.numel() == 0) return;
  const Values values = values_of(x, axis);
  const State state{low.mutable_data_ptr<float>(),
                    high.mutable_data_ptr<float>(),
                    counts.mutable_data_ptr<int64_t>(),
                    exponent.mutable_data_ptr<int64_t>(),
                    origin.mutable_data_ptr<int64_t>(),
                    batches.mutable_data_ptr<int64_t>(),
                    spoiled.mutable_data_ptr<int64_t>(),
                    rows,
                    counts.size(1)};
  ++*state.batches;
  const bool usable = rows == 1 ? observe_tensor(values, state) : observe_rows(values, state);
  if (!usable && *state.spoiled == 0) *state.spoiled = *state.batches;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("observe_histogram", quantkern::cpu::observe_histogram_cpu); }
