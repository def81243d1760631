// Counting values in bins and judging a grid by a histogram: one stretch of memory, one thread. Compiled once per
// instruction set.
//
//   formula   numerics/histogram.h (bins); error below
//   bytes     count reads each value once; its counters (64 KB for 4096 bins) stay in the cache
//   numerics  count in float32, exact; error in float64, summed in eight lanes

template <class V>
QK_LANE V ceil_lane(V x) {
  const V nearest = round_even(x);
  return where_less(nearest, x, nearest + V::all(1.0f), nearest);
}

// Added to a whole number below 2^23 it puts the number into the low bits of the float32.
constexpr float kWholeShift = 8388608.0f;
constexpr uint32_t kWholeBits = 0x4B000000u;

template <class V>
struct BinLanes {
  V inverse, origin, last;
};

// One group of lanes; false where a value lies outside the bins.
template <class V>
QK_LANE bool count_lanes(V x, const BinLanes<V>& p, uint32_t* counters) {
  const V bin = ceil_lane(x * p.inverse) - p.origin;
  if (equal_bits(bin, min_lane(p.last, max_lane(V::all(0.0f), bin))) != (1u << V::width) - 1) return false;
  float whole[V::width];
  uint32_t index[V::width];
  store(whole, bin + V::all(kWholeShift));
  std::memcpy(index, whole, sizeof index);
  for (int k = 0; k < V::width; ++k) ++counters[(index[k] - kWholeBits) * kCounters + k % kCounters];
  return true;
}

template <class T>
static bool count_typed(const T* x, int64_t begin, int64_t end, float inverse, float origin, int64_t bins,
                        uint32_t* counters, Range& range) {
  using V = FloatVec;
  const BinLanes<V> p{V::all(inverse), V::all(origin), V::all(static_cast<float>(bins - 1))};
  V low = V::all(range.min), high = V::all(range.max), value;
  int64_t i = begin;
  for (; i + V::width <= end; i += V::width) {
    load(x + i, value);
    if (!count_lanes(value, p, counters)) return false;
    low = min_lane(value, low);
    high = max_lane(value, high);
  }
  float lows[V::width], highs[V::width];
  store(lows, low);
  store(highs, high);
  for (int k = 0; k < V::width; ++k) range = merge(range, Range{lows[k], highs[k]});
  for (; i < end; ++i) {
    const float rest = to_float(x[i]);
    float bin = __builtin_ceilf(rest * inverse) - origin;
    if (!(bin >= 0 && bin < static_cast<float>(bins))) return false;
    ++counters[static_cast<int64_t>(bin) * kCounters];
    range = merge(range, Range{rest, rest});
  }
  return true;
}

static bool count(DType dtype, const void* x, int64_t begin, int64_t end, float inverse, float origin, int64_t bins,
                  uint32_t* counters, Range& range) {
  switch (dtype) {
    case DType::kFloat:
      return count_typed(static_cast<const float*>(x), begin, end, inverse, origin, bins, counters, range);
    case DType::kHalf:
      return count_typed(static_cast<const Half*>(x), begin, end, inverse, origin, bins, counters, range);
    case DType::kBFloat16:
      return count_typed(static_cast<const BFloat16*>(x), begin, end, inverse, origin, bins, counters, range);
    case DType::kDouble:
      break;  // converted before
  }
  return false;
}

template <class T>
static bool extremes_typed(const T* x, int64_t begin, int64_t end, Range& range) {
  using V = FloatVec;
  // x - x is 0 where x is finite and NaN elsewhere; one that is not 0 stays so.
  V low = V::all(range.min), high = V::all(range.max), bad = V::all(0.0f), value;
  int64_t i = begin;
  for (; i + V::width <= end; i += V::width) {
    load(x + i, value);
    bad = bad + (value - value);
    low = min_lane(value, low);
    high = max_lane(value, high);
  }
  bool finite = equal_bits(bad, V::all(0.0f)) == (1u << V::width) - 1;
  float lows[V::width], highs[V::width];
  store(lows, low);
  store(highs, high);
  for (int k = 0; k < V::width; ++k) range = merge(range, Range{lows[k], highs[k]});
  for (; i < end; ++i) {
    const float rest = to_float(x[i]);
    finite = finite && rest - rest == 0.0f;
    range = merge(range, Range{rest, rest});
  }
  return finite;
}

static bool extremes(DType dtype, const void* x, int64_t begin, int64_t end, Range& range) {
  switch (dtype) {
    case DType::kFloat:
      return extremes_typed(static_cast<const float*>(x), begin, end, range);
    case DType::kHalf:
      return extremes_typed(static_cast<const Half*>(x), begin, end, range);
    case DType::kBFloat16:
      return extremes_typed(static_cast<const BFloat16*>(x), begin, end, range);
    case DType::kDouble:
      break;  // converted before
  }
  return false;
}

// With r = the nearest integer of the grid the integral is r / 12 + (x - r)^3 / 3: every whole step within the grid
// contributes 1 / 12, what lies outside a third of its distance to the end, cubed.
static double error(const double* edges, const double* change, int64_t count, double scale, double first, double last) {
  using V = Lanes<double>;
  V sum = V::all(0.0);
  for (int64_t i = 0; i < count; i += V::width) {
    V edge, weight;
    load(edges + i, edge);
    load(change + i, weight);
    const V steps = edge / V::all(scale);
    const V nearest = round_even(min_lane(V::all(last), max_lane(V::all(first), steps)));
    const V rest = steps - nearest;
    sum = sum + (nearest * V::all(1.0 / 12) + rest * rest * rest / V::all(3.0)) * weight;
  }
  return sum_of(sum);
}

static const HistogramLoops histogram_loops{count, extremes, error};
