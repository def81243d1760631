// The loops over values and over bins, behind one table per instruction set. No torch.
#pragma once

#include <cstdint>

#include "../numerics/dtype.h"
#include "../numerics/ranges.h"

namespace quantkern::cpu {

// Neighbouring values often fall into the same bin (zeros above all), and adding to one place again takes as long as
// four additions elsewhere: every bin has this many counters, side by side.
constexpr int64_t kCounters = 4;

struct HistogramLoops {
  // counters[kCounters * bin + ...] take in every value of [begin, end), bin = ceil(x * inverse) - origin, and `range`
  // its smallest and largest value. Stops with false at a value outside the bins or NaN.
  bool (*count)(DType dtype, const void* x, int64_t begin, int64_t end, float inverse, float origin, int64_t bins,
                uint32_t* counters, Range& range);
  // The smallest and largest value; false where there is NaN or an infinity.
  bool (*extremes)(DType dtype, const void* x, int64_t begin, int64_t end, Range& range);
  // The sum over edges of change[i] * integral from 0 to edges[i] / scale of the squared distance to the nearest
  // integer of [first, last]; count is a multiple of 8.
  double (*error)(const double* edges, const double* change, int64_t count, double scale, double first, double last);
};

const HistogramLoops& histogram_loops();

}  // namespace quantkern::cpu
