// fake_quantize_activation on the CPU: running range, scale and zero point, fake-quantize.
//
// One pass for the range (skipped while not observing) and one that quantizes: 12 bytes an element in float32.
#include <torch/library.h>

#include "../common/check_args.h"
#include "fake_quantize.h"
#include "ranges.h"

namespace quantkern::cpu {
namespace {

struct ActivationState {
  float *running_min, *running_max, *scale;
  int32_t* zero_point;
  int quant_min, quant_max;
  bool symmetric;
  EmaFactors factors;

  // Takes the batch's range of one channel in.
  void observe(const Range& batch, int64_t channel) const {
    const Range running = update_running({running_min[channel], running_max[channel]}, batch, factors);
    running_min[channel] = running.min;
    running_max[channel] = running.max;
    if (!is_seen(running)) return;
    const ScaleZeroPoint chosen = choose_scale(running, quant_min, quant_max, symmetric);
    scale[channel] = chosen.scale;
    zero_point[channel] = chosen.zero_point;
  }
};

// run_clip, for an out of another type too.
void clip_into(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask, const Clip& clip) {
  if (in.scalar_type() == out.scalar_type()) return run_clip(in, out, mask, clip.lower, clip.upper);
  const at::Tensor clipped = new_strided(in.sizes(), in.strides(), in);
  run_clip(in, clipped, mask, clip.lower, clip.upper);
  out.copy_(clipped);
}

TensorPair fake_quantize_activation_cpu(const at::Tensor& x, at::Tensor& running_min, at::Tensor& running_max,
                                        at::Tensor& scale, at::Tensor& zero_point, const at::Tensor& observing,
                                        int64_t quant_min, int64_t quant_max, bool symmetric, double ema_decay,
                                        std::optional<int64_t> axis, const std::optional<at::Tensor>& step,
                                        int64_t start_step, bool with_mask, std::optional<double> lower,
                                        std::optional<double> upper, std::optional<at::ScalarType> dtype) {
  check_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_state(running_min, x, axis, at::kFloat, "running_min");
  check_state(running_max, x, axis, at::kFloat, "running_max");
  check_state(scale, x, axis, at::kFloat, "scale");
  check_state(zero_point, x, axis, at::kInt, "zero_point");
  check_state(observing, x, std::nullopt, at::kBool, "observing");
  check_ema_decay(ema_decay);
  check_step(step, x);
  const Clip clip = check_clip(lower, upper, x.scalar_type());
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  at::Tensor mask = new_mask(x, with_mask);
  if (x.numel() == 0) return {out, mask};
  const Layout layout = layout_of(out, axis);
  const ActivationState state{running_min.mutable_data_ptr<float>(),
                              running_max.mutable_data_ptr<float>(),
                              scale.mutable_data_ptr<float>(),
                              zero_point.mutable_data_ptr<int32_t>(),
                              static_cast<int>(quant_min),
                              static_cast<int>(quant_max),
                              symmetric,
                              ema_factors(ema_decay)};
  if (*observing.const_data_ptr<bool>()) {
    const std::vector<Range> ranges = channel_ranges(in, layout);
    for (int64_t c = 0; c < layout.channels; ++c) state.observe(clip_range(ranges[c], clip), c);
  }
  PreparedParams params(layout, quant_min, quant_max);
  bool active = !is_delayed(step, start_step);
  for (int64_t c = 0; c < layout.channels; ++c) {
    active = active && is_seen({state.running_min[c], state.running_max[c]});
    params.set(c, reciprocal_scale(state.scale[c]), state.scale[c], static_cast<float>(state.zero_point[c]));
  }
  params.finish();
  if (clip.wanted) params.clip(clip.lower, clip.upper);
  if (active)
    run_fake_quantize(in, out, mask, params.view());
  else if (clip.wanted)
    clip_into(in, out, mask, clip);
  else
    run_identity(in, out, mask);
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("fake_quantize_activation_forward", quantkern::cpu::fake_quantize_activation_cpu);
}
