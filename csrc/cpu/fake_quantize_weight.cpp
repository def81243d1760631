// fake_quantize_weight on the CPU: current range, scale and zero point, fake-quantize.
//
// Per channel of a contiguous weight (the first axis) both happen block by block, so that a row is quantized while
// it still lies in the cache: 8 bytes an element in float32 instead of 12. Otherwise the range takes a pass of its own.
#include <torch/library.h>

#include <numeric>

#include "../common/check_args.h"
#include "fake_quantize.h"
#include "parallel.h"
#include "ranges.h"

namespace quantkern::cpu {
namespace {

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

// Blocks of whole rows, about half of a second-level cache each. Threads meet only where a row begins at a multiple
// of kStretch; inside, what lies behind the last such multiple waits for the next block.
void quantize_row_blocks(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask, const Layout& layout,
                         const WeightState& state, PreparedParams& params) {
  constexpr int64_t kBlock = 32768;
  const FakeQuantizeLoops& loops = fake_quantize_loops();
  const DType dtype = dtype_of(in);
  const void* x = in.const_data_ptr();
  void* y = out.mutable_data_ptr();
  uint8_t* bits = mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const bool streamed = is_streamed(in, out);
  const int64_t unit = kStretch / std::gcd(layout.inner, kStretch);
  const int64_t units = (layout.channels + unit - 1) / unit;
  const int64_t rows_a_block = std::max<int64_t>(1, kBlock / layout.inner);
  at::parallel_for(0, units, std::max<int64_t>(1, kGrain / (unit * layout.inner)), [&](int64_t first, int64_t last) {
    const int64_t stop = std::min(layout.channels, last * unit);
    int64_t done = first * unit * layout.inner;
    for (int64_t c = first * unit; c < stop;) {
      const int64_t block_end = std::min(stop, c + rows_a_block);
      for (; c < block_end; ++c)
        state.choose(loops.range(dtype, x, c * layout.inner, (c + 1) * layout.inner), c, params);
      const int64_t known = c == stop ? c * layout.inner : c * layout.inner / kStretch * kStretch;
      if (known > done) loops.quantize(dtype, x, y, bits, done, known, params.view(), streamed);
      done = std::max(done, known);
    }
  });
}

TensorPair fake_quantize_weight_cpu(const at::Tensor& x, at::Tensor& scale, at::Tensor& zero_point, int64_t quant_min,
                                    int64_t quant_max, bool symmetric, std::optional<int64_t> axis,
                                    const std::optional<at::Tensor>& step, int64_t start_step, bool with_mask) {
  check_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_state(scale, x, axis, at::kFloat, "scale");
  check_state(zero_point, x, axis, at::kInt, "zero_point");
  check_step(step, x);
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  if (x.numel() == 0) return {out, mask};
  const Layout layout = layout_of(out, axis);
  const WeightState state{scale.mutable_data_ptr<float>(), zero_point.mutable_data_ptr<int32_t>(),
                          static_cast<int>(quant_min), static_cast<int>(quant_max), symmetric};
  PreparedParams params(layout, quant_min, quant_max);
  const bool delayed = is_delayed(step, start_step);
  if (layout.outer == 1 && layout.channels > 1 && layout.inner >= kShortRow && !delayed) {
    quantize_row_blocks(in, out, mask, layout, state, params);
    return {out, mask};
  }
  const std::vector<Range> ranges = channel_ranges(in, layout);
  for (int64_t c = 0; c < layout.channels; ++c) state.choose(ranges[c], c, params);
  if (delayed) {
    run_identity(in, out, mask);
  } else {
    params.finish();
    run_fake_quantize(in, out, mask, params.view());
  }
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("fake_quantize_weight_forward", quantkern::cpu::fake_quantize_weight_cpu);
}
