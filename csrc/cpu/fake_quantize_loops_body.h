// Fake-quantization on the CPU: one stretch of memory, one thread. Compiled once per instruction set.
//
//   formula   numerics/affine.h (fake-quantize), numerics/ranges.h (min and max)
//   layout    elements in memory order; element i belongs to channel (i / inner) % channels
//   bytes     forward reads and writes an element once and writes 1/8 byte of mask; backward the same backwards
//   numerics  float32 lanes (float64 for float64); groups that cross a channel's end take their parameters lane
//             by lane, so every element is computed by the same expression wherever it lies

#include "channel_lanes.h"

// What a pass does besides quantizing, known when it is compiled.
struct Pass {
  bool masks, streams, clips;
};
constexpr Pass in_cache(Pass pass) { return {pass.masks, false, pass.clips}; }

// The numbers that are the same in every lane and every channel.
template <class V>
struct Limits {
  V quant_min, quant_max, lower, upper;
};

template <class V>
QK_LANE Limits<V> limits_of(const ChannelParams& p) {
  using Lane = typename LaneType<V>::type;
  return {V::all(p.quant_min), V::all(p.quant_max), V::all(static_cast<Lane>(p.lower)),
          V::all(static_cast<Lane>(p.upper))};
}

// One whole group of lanes; returns its mask bits.
template <Pass kPass, class T, class Y, class V>
QK_LANE uint32_t quantize_lanes(const T* x, Y* y, const Affine<V>& p, const Limits<V>& l) {
  V value, rounded, clamped;
  load(x, value);
  uint32_t inside = ~0u;
  if (kPass.clips) {
    inside = less_bits(l.lower, value) & less_bits(value, l.upper);
    value = clip_lane(value, l.lower, l.upper);
  }
  store<kPass.streams>(y, fake_quantize_lane(value, p, l.quant_min, l.quant_max, rounded, clamped));
  return kPass.masks ? equal_bits(rounded, clamped) & inside : 0;
}

template <Pass kPass, class T, class Y, class V>
QK_LANE void quantize_group(const T* x, Y* y, uint8_t* mask, const Affine<V>& p, const Limits<V>& l) {
  const uint32_t bits = quantize_lanes<kPass>(x, y, p, l);
  if (!kPass.masks) return;
  mask[0] = static_cast<uint8_t>(bits);
  if (V::width == 16) mask[1] = static_cast<uint8_t>(bits >> 8);
}

// Several groups whose mask bits are stored as one word: a third faster than byte by byte.
constexpr int64_t kBlock = 32;
template <Pass kPass, class T, class Y, class V>
QK_LANE void quantize_block(const T* x, Y* y, uint8_t* mask, const Affine<V>& p, const Limits<V>& l) {
  uint32_t bits = 0;
  for (int64_t k = 0; k < kBlock; k += V::width) bits |= quantize_lanes<kPass>(x + k, y + k, p, l) << k;
  if (kPass.masks) std::memcpy(mask, &bits, sizeof bits);
}

// The first `count` lanes of a group, through buffers: the end of the tensor.
template <Pass kPass, class T, class Y, class V>
QK_LANE void quantize_partial(const T* x, Y* y, uint8_t* mask, int64_t count, const Affine<V>& p, const Limits<V>& l) {
  T in[V::width] = {};
  Y out[V::width];
  uint8_t bits[2] = {0, 0};
  std::memcpy(in, x, count * sizeof(T));
  quantize_group<in_cache(kPass)>(in, out, bits, p, l);
  std::memcpy(y, out, count * sizeof(Y));
  if (!kPass.masks) return;
  const uint32_t kept = (bits[0] | static_cast<uint32_t>(bits[1]) << 8) & ((1u << count) - 1u);
  mask[0] = static_cast<uint8_t>(kept);
  if (count > 8) mask[1] = static_cast<uint8_t>(kept >> 8);
}

template <Pass kPass, class T, class Y, class V>
QK_LANE void quantize_some(const T* x, Y* y, uint8_t* mask, int64_t i, int64_t end, const Affine<V>& p,
                           const Limits<V>& l) {
  uint8_t* bits = kPass.masks ? mask + i / 8 : nullptr;
  if (end - i >= V::width)
    quantize_group<in_cache(kPass)>(x + i, y + i, bits, p, l);
  else
    quantize_partial<kPass>(x + i, y + i, bits, end - i, p, l);
}

// Element by element parameters, which repeat every `channels` elements.
template <Pass kPass, class T, class Y>
static void quantize_columns(const T* x, Y* y, uint8_t* mask, int64_t begin, int64_t end, const ChannelParams& p) {
  using V = typename VecOf<T>::type;
  const Limits<V> limits = limits_of<V>(p);
  const int64_t advance = V::width % p.channels;
  int64_t c = begin % p.channels;
  for (int64_t i = begin; i < end; i += V::width) {
    const auto params = load_params<V>(p.inverse + c, p.scale + c, p.zero_point + c);
    if (end - i >= V::width)
      quantize_group<kPass>(x + i, y + i, kPass.masks ? mask + i / 8 : nullptr, params, limits);
    else
      quantize_partial<kPass>(x + i, y + i, kPass.masks ? mask + i / 8 : nullptr, end - i, params, limits);
    c += advance;
    if (c >= p.channels) c -= p.channels;
  }
}

template <Pass kPass, class T, class Y>
static void quantize_rows(const T* x, Y* y, uint8_t* mask, int64_t begin, int64_t end, const ChannelParams& p) {
  using V = typename VecOf<T>::type;
  const Limits<V> limits = limits_of<V>(p);
  for (int64_t i = begin; i < end;) {
    const int64_t row = p.channels == 1 ? 0 : i / p.inner;
    const int64_t stop = p.channels == 1 || (row + 1) * p.inner > end ? end : (row + 1) * p.inner;
    const auto params = params_of<V>(p, p.channels == 1 ? 0 : row % p.channels);
    for (; i + kBlock <= stop; i += kBlock)
      quantize_block<kPass>(x + i, y + i, kPass.masks ? mask + i / 8 : nullptr, params, limits);
    for (; i + V::width <= stop; i += V::width)
      quantize_group<kPass>(x + i, y + i, kPass.masks ? mask + i / 8 : nullptr, params, limits);
    if (i == stop) continue;
    quantize_some<kPass>(x, y, mask, i, end, stop == end ? params : gather_params<V>(p, i), limits);
    i += V::width;
  }
}

template <Pass kPass, class T, class Y = T>
static void quantize_typed(const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end, const ChannelParams& p) {
  if (p.channels > 1 && p.inner == 1)
    quantize_columns<kPass>(static_cast<const T*>(x), static_cast<Y*>(y), mask, begin, end, p);
  else
    quantize_rows<kPass>(static_cast<const T*>(x), static_cast<Y*>(y), mask, begin, end, p);
}

template <Pass kPass>
static void quantize_any(DType dtype, DType out, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end,
                         const ChannelParams& p) {
  if (dtype != out) {  // float32 that is to become one of the 16-bit types
    if (out == DType::kHalf) return quantize_typed<kPass, float, Half>(x, y, mask, begin, end, p);
    return quantize_typed<kPass, float, BFloat16>(x, y, mask, begin, end, p);
  }
  switch (dtype) {
    case DType::kFloat:
      return quantize_typed<kPass, float>(x, y, mask, begin, end, p);
    case DType::kHalf:
      return quantize_typed<kPass, Half>(x, y, mask, begin, end, p);
    case DType::kBFloat16:
      return quantize_typed<kPass, BFloat16>(x, y, mask, begin, end, p);
    case DType::kDouble:
      return quantize_typed<kPass, double>(x, y, mask, begin, end, p);
  }
}

static void quantize(DType dtype, DType out, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end,
                     const ChannelParams& p, bool streamed) {
  constexpr auto passes = std::array{
      quantize_any<Pass{false, false, false}>, quantize_any<Pass{false, false, true}>,
      quantize_any<Pass{false, true, false}>,  quantize_any<Pass{false, true, true}>,
      quantize_any<Pass{true, false, false}>,  quantize_any<Pass{true, false, true}>,
      quantize_any<Pass{true, true, false}>,   quantize_any<Pass{true, true, true}>,
  };
  passes[4 * (mask != nullptr) + 2 * streamed + p.clips](dtype, out, x, y, mask, begin, end, p);
  if (streamed) stream_fence();
}

template <bool kStream, class T, class V>
QK_LANE uint32_t clip_lanes(const T* x, T* y, V lower, V upper) {
  V value;
  load(x, value);
  store<kStream>(y, clip_lane(value, lower, upper));
  return less_bits(lower, value) & less_bits(value, upper);
}

template <bool kStream, class T>
static void clip_typed(const void* x_data, void* y_data, uint8_t* mask, int64_t begin, int64_t end, double lower,
                       double upper) {
  using V = typename VecOf<T>::type;
  using Lane = typename LaneType<V>::type;
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  const V low = V::all(static_cast<Lane>(lower)), high = V::all(static_cast<Lane>(upper));
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    uint32_t inside = 0;
    for (int64_t k = 0; k < kBlock; k += V::width) inside |= clip_lanes<kStream>(x + i + k, y + i + k, low, high) << k;
    if (mask) std::memcpy(mask + i / 8, &inside, sizeof inside);
  }
  for (; i < end; i += V::width) {
    const int64_t count = end - i < V::width ? end - i : V::width;
    T group[V::width] = {};
    std::memcpy(group, x + i, count * sizeof(T));
    const uint32_t inside = clip_lanes<false>(group, group, low, high) & ((1u << count) - 1u);
    std::memcpy(y + i, group, count * sizeof(T));
    if (!mask) continue;
    mask[i / 8] = static_cast<uint8_t>(inside);
    if (count > 8) mask[i / 8 + 1] = static_cast<uint8_t>(inside >> 8);
  }
  if (kStream) stream_fence();
}

static void clip(DType dtype, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end, double lower,
                 double upper, bool streamed) {
  switch (dtype) {
    case DType::kFloat:
      return (streamed ? clip_typed<true, float> : clip_typed<false, float>)(x, y, mask, begin, end, lower, upper);
    case DType::kHalf:
      return (streamed ? clip_typed<true, Half> : clip_typed<false, Half>)(x, y, mask, begin, end, lower, upper);
    case DType::kBFloat16:
      return (streamed ? clip_typed<true, BFloat16> : clip_typed<false, BFloat16>)(x, y, mask, begin, end, lower,
                                                                                   upper);
    case DType::kDouble:
      return clip_typed<false, double>(x, y, mask, begin, end, lower, upper);
  }
}

template <bool kStream, class E>
static void select_typed(const void* grad, const uint8_t* mask, void* out, int64_t begin, int64_t end) {
  constexpr int64_t width = SelectWidth<E>::value;
  const E* g = static_cast<const E*>(grad);
  E* o = static_cast<E*>(out);
  int64_t i = begin;
  for (; i + width <= end; i += width) select_group<kStream>(g + i, mask + i / 8, o + i);
  for (; i < end; ++i) o[i] = (mask[i / 8] >> (i % 8) & 1) ? g[i] : E{0};
}

template <bool kStream>
static void select_any(int64_t element_size, const void* grad, const uint8_t* mask, void* out, int64_t begin,
                       int64_t end) {
  if (element_size == 2) return select_typed<kStream, uint16_t>(grad, mask, out, begin, end);
  if (element_size == 4) return select_typed<kStream, uint32_t>(grad, mask, out, begin, end);
  return select_typed<kStream, uint64_t>(grad, mask, out, begin, end);
}

static void select(int64_t element_size, const void* grad, const uint8_t* mask, void* out, int64_t begin, int64_t end,
                   bool streamed) {
  if (!streamed) return select_any<false>(element_size, grad, mask, out, begin, end);
  select_any<true>(element_size, grad, mask, out, begin, end);
  stream_fence();
}

template <class E>
static void select_in_place_typed(void* data, const uint8_t* mask, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + kStretch <= end; i += kStretch) {
    uint64_t bits;
    std::memcpy(&bits, mask + i / 8, sizeof bits);
    if (bits != ~uint64_t{0}) select_typed<false, E>(data, mask, data, i, i + kStretch);
  }
  select_typed<false, E>(data, mask, data, i, end);
}

static void select_in_place(int64_t element_size, void* grad, const uint8_t* mask, int64_t begin, int64_t end) {
  if (element_size == 2) return select_in_place_typed<uint16_t>(grad, mask, begin, end);
  if (element_size == 4) return select_in_place_typed<uint32_t>(grad, mask, begin, end);
  select_in_place_typed<uint64_t>(grad, mask, begin, end);
}

// Four accumulators hide the latency of the comparisons. With the data first, NaN never gets in.
template <class T>
static Range range_typed(const void* data, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  const T* x = static_cast<const T*>(data);
  V low[4], high[4], value;
  for (int k = 0; k < 4; ++k) {
    low[k] = V::all(empty_range().min);
    high[k] = V::all(empty_range().max);
  }
  int64_t i = begin;
  for (; i + 4 * V::width <= end; i += 4 * V::width) {
    for (int k = 0; k < 4; ++k) {
      load(x + i + k * V::width, value);
      low[k] = min_lane(value, low[k]);
      high[k] = max_lane(value, high[k]);
    }
  }
  // The rest goes through a buffer padded with an element that is there anyway.
  for (; i < end; i += V::width) {
    T group[V::width];
    for (int64_t k = 0; k < V::width; ++k) group[k] = x[i + k < end ? i + k : i];
    load(group, value);
    low[0] = min_lane(value, low[0]);
    high[0] = max_lane(value, high[0]);
  }
  for (int k = 1; k < 4; ++k) {
    low[0] = min_lane(low[k], low[0]);
    high[0] = max_lane(high[k], high[0]);
  }
  float lows[V::width], highs[V::width];
  store(lows, low[0]);
  store(highs, high[0]);
  for (int half = V::width / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) {
      lows[k] = quantkern::min_lane(lows[k], lows[k + half]);
      highs[k] = quantkern::max_lane(highs[k], highs[k + half]);
    }
  }
  return {lows[0], highs[0]};
}

static Range range(DType dtype, const void* x, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat:
      return range_typed<float>(x, begin, end);
    case DType::kHalf:
      return range_typed<Half>(x, begin, end);
    case DType::kBFloat16:
      return range_typed<BFloat16>(x, begin, end);
    case DType::kDouble:
      return range_typed<double>(x, begin, end);
  }
  return empty_range();
}

template <class T>
static void column_ranges_typed(const void* data, int64_t begin, int64_t end, int64_t period, float* low, float* high) {
  using V = typename VecOf<T>::type;
  const T* x = static_cast<const T*>(data);
  for (int64_t row = begin; row < end; row += period) {
    const int64_t count = end - row < period ? end - row : period;
    int64_t j = 0;
    for (; j + V::width <= count; j += V::width) {
      V value, l, h;
      load(x + row + j, value);
      load(low + j, l);
      load(high + j, h);
      store(low + j, min_lane(value, l));
      store(high + j, max_lane(value, h));
    }
    for (; j < count; ++j) {
      const Range merged = merge(Range{low[j], high[j]}, range_typed<T>(x, row + j, row + j + 1));
      low[j] = merged.min;
      high[j] = merged.max;
    }
  }
}

static void column_ranges(DType dtype, const void* x, int64_t begin, int64_t end, int64_t period, float* low,
                          float* high) {
  switch (dtype) {
    case DType::kFloat:
      return column_ranges_typed<float>(x, begin, end, period, low, high);
    case DType::kHalf:
      return column_ranges_typed<Half>(x, begin, end, period, low, high);
    case DType::kBFloat16:
      return column_ranges_typed<BFloat16>(x, begin, end, period, low, high);
    case DType::kDouble:
      return column_ranges_typed<double>(x, begin, end, period, low, high);
  }
}

static const FakeQuantizeLoops fake_quantize_loops{quantize, clip, select, select_in_place, range, column_ranges};
