// What fake_quantize_weight and fake_quantize_weights share on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/layout.h"
#include "../numerics/ranges.h"
#include "channel_params.h"
#include "fake_quantize_loops.h"

namespace quantkern::cpu {

// What a rule says, and where a channel's scale and zero point go.
struct WeightState {
  float* scale;
  int32_t* zero_point;
  int quant_min, quant_max;
  bool symmetric;

  void choose(const Range& range, int64_t channel, PreparedParams& params) const {
    const ScaleZeroPoint chosen = choose_scale(range, quant_min, quant_max, symmetric);
    scale[channel] = chosen.scale;
    zero_point[channel] = chosen.zero_point;
    params.set(channel, reciprocal_scale(chosen.scale), chosen.scale, static_cast<float>(chosen.zero_point));
  }
};

// Where a mask is written; an empty one is not wanted.
inline uint8_t* mask_bits(const at::Tensor& mask) { return mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr; }

// The memory of a dense tensor, of its result and, unless it is null, of the mask.
struct QuantizeMemory {
  DType dtype, out;
  const void* x;
  void* y;
  uint8_t* bits;
  int64_t numel;
  bool streamed;

  QuantizeMemory(const at::Tensor& in, const at::Tensor& out, uint8_t* bits);
  void quantize(int64_t begin, int64_t end, const ChannelParams& params) const {
    fake_quantize_loops().quantize(dtype, out, x, y, bits, begin, end, params, streamed);
  }
  Range range(int64_t begin, int64_t end) const { return fake_quantize_loops().range(dtype, x, begin, end); }
};

// Whether each channel is one long row: it is then quantized while it still lies in the cache.
inline bool is_row_by_row(const Layout& layout) {
  return layout.outer == 1 && layout.channels > 1 && layout.inner >= kShortRow;
}

// The fewest rows that end at a multiple of kStretch.
int64_t rows_a_unit(const Layout& layout);

// Range, scale, zero point and result of the rows [first, stop); first is a multiple of rows_a_unit, and so is stop
// unless it is the last.
void quantize_rows(const QuantizeMemory& memory, const Layout& layout, const WeightState& state, PreparedParams& params,
                   int64_t first, int64_t stop);

// The whole operation on a tensor that has elements. Its parallel regions run on one thread inside another's.
void run_fake_quantize_weight(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask, const Layout& layout,
                              const WeightState& state, bool delayed);

}  // namespace quantkern::cpu
