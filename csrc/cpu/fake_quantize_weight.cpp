// fake_quantize_weight on the CPU: current range, scale and zero point, fake-quantize.
//
// Per channel of a contiguous weight (the first axis) both happen block by block, so that a row is quantized while
// it still lies in the cache: 8 bytes an element in float32 instead of 12. Otherwise the range takes a pass of its own.
#include "fake_quantize_weight.h"

#include <torch/library.h>

#include <numeric>

#include "../common/check_args.h"
#include "fake_quantize.h"
#include "parallel.h"
#include "ranges.h"

namespace quantkern::cpu {

QuantizeMemory::QuantizeMemory(const at::Tensor& in, const at::Tensor& out, uint8_t* bits)
    : dtype(dtype_of(in)),
      out(dtype_of(out)),
      x(in.const_data_ptr()),
      y(out.mutable_data_ptr()),
      bits(bits),
      numel(in.numel()),
      streamed(is_streamed(in, out)) {}

int64_t rows_a_unit(const Layout& layout) { return kStretch / std::gcd(layout.inner, kStretch); }

// Blocks of whole rows, about half of a second-level cache each. What lies behind the last multiple of kStretch waits
// for the next block.
void quantize_rows(const QuantizeMemory& memory, const Layout& layout, const WeightState& state, PreparedParams& params,
                   int64_t first, int64_t stop) {
  constexpr int64_t kRowBlock = 32768;
  const int64_t rows_a_block = std::max<int64_t>(1, kRowBlock / layout.inner);
  int64_t done = first * layout.inner;
  for (int64_t c = first; c < stop;) {
    const int64_t block_end = std::min(stop, c + rows_a_block);
    for (; c < block_end; ++c) state.choose(memory.range(c * layout.inner, (c + 1) * layout.inner), c, params);
    const int64_t known = c == stop ? c * layout.inner : c * layout.inner / kStretch * kStretch;
    if (known > done) memory.quantize(done, known, params.view());
    done = std::max(done, known);
  }
}

void run_fake_quantize_weight(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask, const Layout& layout,
                              const WeightState& state, bool delayed) {
  PreparedParams params(layout, state.quant_min, state.quant_max);
  if (is_row_by_row(layout) && !delayed) {
    const QuantizeMemory memory(in, out, mask_bits(mask));
    const int64_t unit = rows_a_unit(layout), units = (layout.channels + unit - 1) / unit;
    at::parallel_for(0, units, std::max<int64_t>(1, kGrain / (unit * layout.inner)), [&](int64_t first, int64_t last) {
      quantize_rows(memory, layout, state, params, first * unit, std::min(layout.channels, last * unit));
    });
    return;
  }
  const std::vector<Range> ranges = channel_ranges(in, layout);
  for (int64_t c = 0; c < layout.channels; ++c) state.choose(ranges[c], c, params);
  if (delayed) return run_identity(in, out, mask);
  params.finish();
  run_fake_quantize(in, out, mask, params.view());
}

namespace {

TensorPair fake_quantize_weight_cpu(const at::Tensor& x, at::Tensor& scale, at::Tensor& zero_point, int64_t quant_min,
                                    int64_t quant_max, bool symmetric, std::optional<int64_t> axis,
                                    const std::optional<at::Tensor>& step, int64_t start_step, bool with_mask,
                                    std::optional<at::ScalarType> dtype) {
  check_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_state(scale, x, axis, at::kFloat, "scale");
  check_state(zero_point, x, axis, at::kInt, "zero_point");
  check_step(step, x);
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  at::Tensor mask = new_mask(x, with_mask);
  if (x.numel() == 0) return {out, mask};
  const WeightState state{scale.mutable_data_ptr<float>(), zero_point.mutable_data_ptr<int32_t>(),
                          static_cast<int>(quant_min), static_cast<int>(quant_max), symmetric};
  run_fake_quantize_weight(in, out, mask, layout_of(out, axis), state, is_delayed(step, start_step));
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("fake_quantize_weight_forward", quantkern::cpu::fake_quantize_weight_cpu);
}
