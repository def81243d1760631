// Ranges of a whole tensor, of long rows, and of columns: three ways of walking the same memory in order.
#include "ranges.h"

#include "../common/dtype.h"
#include "channel_params.h"
#include "parallel.h"

namespace quantkern::cpu {
namespace {

Range tensor_range(const at::Tensor& x) {
  const auto loop = fake_quantize_loops().range;
  const DType dtype = dtype_of(x);
  const void* data = x.const_data_ptr();
  std::vector<Range> parts(at::get_num_threads(), empty_range());
  for_stretches(x.numel(), [&](int64_t begin, int64_t end) {
    parts[at::get_thread_num()] = merge(parts[at::get_thread_num()], loop(dtype, data, begin, end));
  });
  Range range = empty_range();
  for (const Range& part : parts) range = merge(range, part);
  return range;
}

std::vector<Range> row_ranges(const at::Tensor& x, const Layout& layout) {
  const auto loop = fake_quantize_loops().range;
  const DType dtype = dtype_of(x);
  const void* data = x.const_data_ptr();
  std::vector<Range> ranges(layout.channels, empty_range());
  const int64_t grain = std::max<int64_t>(1, kGrain / (layout.inner * layout.outer));
  at::parallel_for(0, layout.channels, grain, [&](int64_t first, int64_t last) {
    for (int64_t o = 0; o < layout.outer; ++o) {
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = (o * layout.channels + c) * layout.inner;
        ranges[c] = merge(ranges[c], loop(dtype, data, begin, begin + layout.inner));
      }
    }
  });
  return ranges;
}

// Whole periods of `channels * inner` columns, several at a time where a period is short.
std::vector<Range> column_ranges(const at::Tensor& x, const Layout& layout) {
  const auto loop = fake_quantize_loops().column_ranges;
  const DType dtype = dtype_of(x);
  const void* data = x.const_data_ptr();
  const int64_t row = layout.channels * layout.inner;
  const int64_t period = row * std::max<int64_t>(1, 256 / row);
  const int64_t periods = (x.numel() + period - 1) / period;
  std::vector<Range> ranges(layout.channels, empty_range());
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(1, x.numel() / kGrain));
  std::vector<float> low(threads * period, empty_range().min), high(threads * period, empty_range().max);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = periods * t / threads * period;
      const int64_t end = std::min(x.numel(), periods * (t + 1) / threads * period);
      loop(dtype, data, begin, end, period, low.data() + t * period, high.data() + t * period);
    }
  });
  for (int64_t begin = 0; begin < threads * period; begin += row) {
    for (int64_t c = 0, i = begin; c < layout.channels; ++c) {
      Range range = ranges[c];
      for (const int64_t end = i + layout.inner; i < end; ++i) range = merge(range, Range{low[i], high[i]});
      ranges[c] = range;
    }
  }
  return ranges;
}

}  // namespace

std::vector<Range> channel_ranges(const at::Tensor& x, const Layout& layout) {
  if (layout.channels == 1) return {tensor_range(x)};
  return layout.inner < kShortRow ? column_ranges(x, layout) : row_ranges(x, layout);
}

}  // namespace quantkern::cpu
