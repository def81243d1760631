// What an observer without a histogram does with a batch, on the CPU: take it into the range.
//
//   formula   the smallest and largest of all batches, or a moving average of each batch's (numerics/ranges.h)
//   layout    a tensor is one row; per channel each channel is a row
//   who       per tensor threads share the elements, per channel they share the rows
//   bytes     4 an element, read once
//   numerics  exact: the state does not depend on threads
#include <torch/library.h>

#include <vector>

#include "observed_values.h"

namespace quantkern::cpu {
namespace {

void observe_range_cpu(const at::Tensor& x, std::optional<int64_t> axis, std::optional<double> ema_decay,
                       at::Tensor& low, at::Tensor& high, at::Tensor& batches, at::Tensor& spoiled) {
  check_input(x);
  axis = check_axis(x, axis);
  check_state(low, x, axis, at::kFloat, "low");
  check_state(high, x, axis, at::kFloat, "high");
  check_counts(batches, {}, at::kLong, "batches");
  check_counts(spoiled, {}, at::kLong, "spoiled");
  if (x.numel() == 0) return;
  const Values values = values_of(x, axis);
  const int64_t rows = low.numel();
  std::vector<Range> ranges(rows, empty_range());
  const bool usable = rows == 1 ? tensor_range(values, ranges[0]) : row_ranges(values, ranges);
  int64_t& number = *batches.mutable_data_ptr<int64_t>();
  int64_t& first_spoiled = *spoiled.mutable_data_ptr<int64_t>();
  ++number;
  if (!usable) {
    if (first_spoiled == 0) first_spoiled = number;
    return;
  }
  float *lows = low.mutable_data_ptr<float>(), *highs = high.mutable_data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    const Range before{lows[row], highs[row]};
    const Range after =
        ema_decay ? update_running(before, ranges[row], ema_factors(*ema_decay)) : merge(before, ranges[row]);
    lows[row] = after.min;
    highs[row] = after.max;
  }
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("observe_range", quantkern::cpu::observe_range_cpu); }
