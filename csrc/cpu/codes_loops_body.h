// Fake-quantized numbers as bytes on the CPU: one stretch of memory, one thread. Compiled once per instruction set.
//
//   formula   code = rint(x / scale) + zero_point - quant_min, x = (code + quant_min - zero_point) * scale
//   layout    as in fake_quantize_loops_body.h
//   bytes     4 read and 1 written an element, and the other way round
//   numerics  numerics/affine_lane.h; encoding decodes at once and compares, so that nothing is ever lost

#include "channel_lanes.h"

// Groups that are worked on together.
constexpr int64_t kBlock = 32;

// Gives the elements [begin, end) to work: whole blocks and groups of one channel, and what lies across its end.
template <class V, class W>
QK_LANE void for_groups(int64_t begin, int64_t end, const ChannelParams& p, W& work) {
  const bool columns = p.channels > 1 && p.inner == 1;
  const int64_t advance = V::width % p.channels;
  int64_t column = columns ? begin % p.channels : 0;
  for (int64_t i = begin; columns && i < end; i += V::width) {
    const auto params = load_params<V>(p.inverse + column, p.scale + column, p.zero_point + column);
    end - i < V::width ? work.some(i, end - i, params) : work.whole(i, params);
    column = column + advance >= p.channels ? column + advance - p.channels : column + advance;
  }
  for (int64_t i = begin; !columns && i < end;) {
    const int64_t row = p.channels == 1 ? 0 : i / p.inner;
    const int64_t stop = p.channels == 1 || (row + 1) * p.inner > end ? end : (row + 1) * p.inner;
    const auto params = params_of<V>(p, p.channels == 1 ? 0 : row % p.channels);
    for (; i + kBlock <= stop; i += kBlock) work.block(i, params);
    for (; i + V::width <= stop; i += V::width) work.whole(i, params);
    if (i == stop) continue;
    const auto mixed = stop == end ? params : gather_params<V>(p, i);
    end - i < V::width ? work.some(i, end - i, mixed) : work.whole(i, mixed);
    i += V::width;
  }
}

template <class V>
struct Encoder {
  const float* x;
  uint8_t* codes;
  V low, most;
  uint32_t wrong = 0;

  QK_MEMBER V encode(V value, uint32_t lanes, const Affine<V>& params) {
    const V code = min_lane(most, max_lane(V::all(0), code_lane(value, params, low)));
    wrong |= ~equal_bits(decode_lane(code, params, low), value) & lanes;
    return code;
  }
  QK_MEMBER void block(int64_t i, const Affine<V>& params) {
    V group[kBlock / V::width];
    for (int64_t k = 0; k < kBlock / V::width; ++k) {
      load(x + i + k * V::width, group[k]);
      group[k] = encode(group[k], (1u << V::width) - 1u, params);
    }
    store_block(codes + i, group);
  }
  QK_MEMBER void whole(int64_t i, const Affine<V>& params) {
    V value;
    load(x + i, value);
    store_bytes(codes + i, encode(value, (1u << V::width) - 1u, params));
  }
  QK_MEMBER void some(int64_t i, int64_t count, const Affine<V>& params) {
    V value;
    uint8_t bytes[V::width];
    load_some(x + i, count, value);
    store_bytes(bytes, encode(value, (1u << count) - 1u, params));
    std::memcpy(codes + i, bytes, count);
  }
};

template <class V, bool kStream>
struct Decoder {
  const uint8_t* codes;
  float* x;
  V low;

  QK_MEMBER void block(int64_t i, const Affine<V>& params) {
    for (int64_t k = 0; k < kBlock; k += V::width) whole(i + k, params);
  }
  QK_MEMBER void whole(int64_t i, const Affine<V>& params) {
    V code;
    load(codes + i, code);
    store<kStream>(x + i, decode_lane(code, params, low));
  }
  QK_MEMBER void some(int64_t i, int64_t count, const Affine<V>& params) {
    V code;
    load_some(codes + i, count, code);
    store_some(x + i, count, decode_lane(code, params, low));
  }
};

static bool encode(const float* x, uint8_t* codes, int64_t begin, int64_t end, const ChannelParams& p) {
  using V = FloatVec;
  Encoder<V> work{x, codes, V::all(p.quant_min), V::all(p.quant_max - p.quant_min)};
  for_groups<V>(begin, end, p, work);
  return work.wrong == 0;
}

template <bool kStream>
static void decode_typed(const uint8_t* codes, float* x, int64_t begin, int64_t end, const ChannelParams& p) {
  using V = FloatVec;
  Decoder<V, kStream> work{codes, x, V::all(p.quant_min)};
  for_groups<V>(begin, end, p, work);
  if (kStream) stream_fence();
}

static void decode(const uint8_t* codes, float* x, int64_t begin, int64_t end, const ChannelParams& p, bool streamed) {
  (streamed ? decode_typed<true> : decode_typed<false>)(codes, x, begin, end, p);
}

static const CodesLoops codes_loops{encode, decode};
