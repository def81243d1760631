// The activation path: a moving average of every channel's range, its scale and zero point, and the fake-quantized
// tensor.
//
//   running = running * decay + batch * (1 - decay) -> scale, zero_point (numerics/ranges.h) -> y as in
//   fake_quantize.cu, all of it of x within the bounds of clip where they are wanted; y is that x while the step has
//   not come or a channel has seen no value
//
// Layout: x, y and the mask in the order x lies in memory, [outer, channels, inner]; the state [channels].
// Grid: ranges.cu, then one warp a channel for the state, then fake_quantize.cu. The state kernel raises a flag in the
// workspace where a channel has seen nothing; ranges.cu has cleared it. Nothing is read back by the host, so the
// three launches can be captured in a graph.
// Bytes an element: 12 in float32, 6 in 16 bits, 10 from the one to the other, plus 1/8 for the mask; 8, 4 and 6 while
// observing is off, when x is not read for its range and no state is written.
// Numerics: both factors of the average are rounded to float32 on the host; no contraction.
#include "fake_quantize_activation.cuh"

#include "fake_quantize.cuh"
#include "quantize_group.cuh"
#include "ranges.cuh"

namespace quantkern::cuda {
namespace {

// The flag lies in front of the partials, which stay aligned.
constexpr int64_t kFlagBytes = 16;

struct State {
  float *running_min, *running_max, *scale;
  int* zero_point;
  int quant_min, quant_max;
  bool symmetric;
  EmaFactors factors;
  ClipBounds clip;
};

// Takes one batch into the state of a channel; returns whether the channel has seen a value by now.
__device__ __forceinline__ bool observe(Range batch, int64_t channel, const State& s) {
  if (s.clip.wanted && is_seen(batch)) {
    batch = {clip_lane(batch.min, s.clip.lower, s.clip.upper), clip_lane(batch.max, s.clip.lower, s.clip.upper)};
  }
  const Range running = update_running({s.running_min[channel], s.running_max[channel]}, batch, s.factors);
  s.running_min[channel] = running.min;
  s.running_max[channel] = running.max;
  if (!is_seen(running)) return false;
  const ScaleZeroPoint chosen = choose_scale(running, s.quant_min, s.quant_max, s.symmetric);
  s.scale[channel] = chosen.scale;
  s.zero_point[channel] = chosen.zero_point;
  return true;
}

// One warp a channel.
__global__ void __launch_bounds__(kBlock)
    update_state_kernel(RangePlan plan, const Range* partials, State state, const bool* observing, int* blocked) {
  const bool observes = *observing;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t channel = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
       channel < plan.view.channels; channel += stride) {
    const Range batch = observes ? combine_partials(plan, partials, channel) : empty_range();
    if (threadIdx.x % kWarp != 0) continue;
    const bool seen =
        observes ? observe(batch, channel, state) : is_seen({state.running_min[channel], state.running_max[channel]});
    if (!seen) atomicOr(blocked, 1);
  }
}

}  // namespace

cudaError_t activation_workspace_bytes(const ActivationArguments& a, int64_t& bytes) {
  RangePlan plan;
  const cudaError_t error = plan_ranges(a.view, plan);
  bytes = kFlagBytes + plan.partials() * static_cast<int64_t>(sizeof(Range));
  return error;
}

cudaError_t launch_fake_quantize_activation(const ActivationArguments& a, void* workspace, cudaStream_t stream) {
  RangePlan plan;
  cudaError_t error = plan_ranges(a.view, plan);
  if (error != cudaSuccess) return error;
  int* blocked = static_cast<int*>(workspace);
  Range* partials = reinterpret_cast<Range*>(static_cast<char*>(workspace) + kFlagBytes);
  error = launch_ranges(a.dtype, a.x, plan, partials, a.observing, blocked, stream);
  if (error != cudaSuccess) return error;
  const State state = {a.running_min, a.running_max, a.scale,     a.zero_point,
                       a.quant_min,   a.quant_max,   a.symmetric, ema_factors(a.ema_decay),
                       a.clip};
  error = launch(update_state_kernel, ceil_div(a.view.channels, kBlock / kWarp), kBlock, stream, plan, partials, state,
                 a.observing, blocked);
  if (error != cudaSuccess) return error;
  const Parameters parameters = {a.scale, a.zero_point, false, 0.0f, 0.0f};
  const Gate gate = {a.gate.step, a.gate.start_step, blocked};
  return launch_fake_quantize(
      {a.dtype, a.x, a.y, a.mask, a.view, parameters, gate, a.quant_min, a.quant_max, a.clip, a.y_dtype}, stream);
}

}  // namespace quantkern::cuda
