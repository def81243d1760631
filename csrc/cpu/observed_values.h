// The values of a batch that an observer sees, row by row, and their range.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../common/check_args.h"
#include "../common/layout.h"
#include "../numerics/ranges.h"
#include "channel_params.h"
#include "histogram_loops.h"
#include "parallel.h"

namespace quantkern::cpu {

struct Values {
  at::Tensor held;
  DType dtype;
  const void* data;
  Layout layout;

  // f(begin, end) of every stretch of a row, until one says false.
  template <class F>
  bool every_stretch(int64_t row, const F& f) const {
    for (int64_t o = 0; o < layout.outer; ++o) {
      const int64_t begin = (o * layout.channels + row) * layout.inner;
      if (!f(begin, begin + layout.inner)) return false;
    }
    return true;
  }
};

// A whole tensor is one row; per channel each channel is one. float64 becomes float32.
inline Values values_of(const at::Tensor& x, std::optional<int64_t> axis) {
  const at::Tensor real = x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x;
  at::Tensor dense = as_dense(real);
  Layout layout = layout_of(dense, axis);
  if (layout.channels > 1 && layout.inner < kShortRow) {
    dense = dense.movedim(*axis, 0).contiguous();
    layout = layout_of(dense, 0);
  }
  return {dense, dtype_of(dense), dense.const_data_ptr(), layout};
}

// The range of a row; false where there is NaN or an infinity.
inline bool row_range(const Values& x, int64_t row, Range& range) {
  return x.every_stretch(
      row, [&](int64_t begin, int64_t end) { return histogram_loops().extremes(x.dtype, x.data, begin, end, range); });
}

inline bool tensor_range(const Values& x, Range& range) {
  std::vector<Range> ranges(at::get_num_threads(), empty_range());
  std::atomic<bool> finite{true};
  for_stretches(x.layout.inner, [&](int64_t begin, int64_t end) {
    if (!histogram_loops().extremes(x.dtype, x.data, begin, end, ranges[at::get_thread_num()])) finite = false;
  });
  for (const Range& part : ranges) range = merge(range, part);
  return finite;
}

// The range of every row; false where there is NaN or an infinity.
inline bool row_ranges(const Values& x, std::vector<Range>& ranges) {
  std::atomic<bool> finite{true};
  const int64_t rows = static_cast<int64_t>(ranges.size());
  const int64_t grain = std::max<int64_t>(1, kGrain / (x.layout.outer * x.layout.inner));
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      if (!row_range(x, row, ranges[row])) finite = false;
  });
  return finite;
}

inline void check_counts(const at::Tensor& value, c10::IntArrayRef sizes, at::ScalarType dtype, const char* name) {
  check_dtype(value, dtype, name);
  TORCH_CHECK_VALUE(value.sizes() == sizes && value.is_contiguous() && value.is_cpu(), name, " must be contiguous, ",
                    "on the CPU and of shape ", sizes, ", got shape ", value.sizes(), " on ", value.device());
}

}  // namespace quantkern::cpu
