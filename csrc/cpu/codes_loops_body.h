// Fake-quantized numbers as bytes on the CPU: one stretch of memory, one thread. Compiled once per instruction set.
//
//   formula   code = rint(x / scale) + zero_point - quant_min, x = (code + quant_min - zero_point) * scale
//   layout    as in fake_quantize_loops_body.h
//   bytes     4 read and 1 written an element, and the other way round
//   numerics  numerics/affine_lane.h; encoding decodes at once and compares, so that nothing is ever lost

#include "channel_lanes.h"

// Calls f(i, count, parameters) for the groups of lanes of [begin, end).
template <class V, class F>
QK_LANE void for_groups(int64_t begin, int64_t end, const ChannelParams& p, const F& f) {
  const bool columns = p.channels > 1 && p.inner == 1;
  const int64_t advance = V::width % p.channels;
  int64_t column = columns ? begin % p.channels : 0;
  Affine<V> params = params_of<V>(p, 0);
  int64_t row = -1, stop = p.channels == 1 ? end : begin;
  for (int64_t i = begin; i < end; i += V::width) {
    if (columns) {
      params = load_params<V>(p.inverse + column, p.scale + column, p.zero_point + column);
      column = column + advance >= p.channels ? column + advance - p.channels : column + advance;
    } else if (i + V::width > stop && p.channels > 1) {
      row = i / p.inner;
      stop = (row + 1) * p.inner;
      params = i + V::width <= stop ? params_of<V>(p, row % p.channels) : gather_params<V>(p, i);
    }
    f(i, end - i < V::width ? end - i : V::width, params);
  }
}

static bool encode(const float* x, uint8_t* codes, int64_t begin, int64_t end, const ChannelParams& p) {
  using V = FloatVec;
  const V low = V::all(p.quant_min), most = V::all(p.quant_max - p.quant_min), none = V::all(0);
  uint32_t wrong = 0;
  for_groups<V>(begin, end, p, [&](int64_t i, int64_t count, const Affine<V>& params) QK_INLINE {
    V value;
    const bool whole = count == V::width;
    whole ? load(x + i, value) : load_some(x + i, count, value);
    const V code = min_lane(most, max_lane(none, code_lane(value, params, low)));
    wrong |= ~equal_bits(decode_lane(round_even(code), params, low), value) & ((1u << count) - 1u);
    uint8_t bytes[V::width];
    store_bytes(whole ? codes + i : bytes, code);
    if (!whole) std::memcpy(codes + i, bytes, count);
  });
  return wrong == 0;
}

template <bool kStream>
static void decode_typed(const uint8_t* codes, float* x, int64_t begin, int64_t end, const ChannelParams& p) {
  using V = FloatVec;
  const V low = V::all(p.quant_min);
  for_groups<V>(begin, end, p, [&](int64_t i, int64_t count, const Affine<V>& params) QK_INLINE {
    V code;
    const bool whole = count == V::width;
    whole ? load(codes + i, code) : load_some(codes + i, count, code);
    const V value = decode_lane(code, params, low);
    whole ? store<kStream>(x + i, value) : store_some(x + i, count, value);
  });
  if (kStream) stream_fence();
}

static void decode(const uint8_t* codes, float* x, int64_t begin, int64_t end, const ChannelParams& p, bool streamed) {
  (streamed ? decode_typed<true> : decode_typed<false>)(codes, x, begin, end, p);
}

static const CodesLoops codes_loops{encode, decode};
