// From observed ranges to scale and zero point, one channel at a time, in float32.
//
//   symmetric  scale = max|x| / ((quant_max - quant_min) / 2)
//              zero_point = 0 for signed ranges, (quant_min + quant_max) / 2 rounded down for unsigned ones
//   affine     scale = (max - min) / (quant_max - quant_min), the range first extended to hold 0
//              zero_point = clamp(quant_min - rint(min / scale), quant_min, quant_max)
//   EMA        running = running * decay + batch * (1 - decay); the first batch stands for "running"
//
// Source: Jacob et al. 2018, sections 3 and 3.1; the same numbers as NNI 2.10's QAT_Quantizer.
#pragma once

#include "affine.h"

namespace quantkern {

// The smallest normal float: an all-zero tensor gets this scale, and its reciprocal is still finite.
constexpr float kSmallestScale = 1.17549435e-38f;

struct Range {
  float min, max;
};

// No value seen yet: min > max. Also the identity of merging two ranges.
QK_HOST_DEVICE Range empty_range() { return {__builtin_inff(), -__builtin_inff()}; }
QK_HOST_DEVICE bool is_seen(const Range& r) { return r.min <= r.max; }
QK_HOST_DEVICE bool is_finite(const Range& r) { return is_finite(r.min) && is_finite(r.max); }
QK_HOST_DEVICE Range merge(const Range& a, const Range& b) { return {min_lane(b.min, a.min), max_lane(b.max, a.max)}; }

struct ScaleZeroPoint {
  float scale;
  int zero_point;
};

QK_HOST_DEVICE ScaleZeroPoint choose_scale(Range r, int quant_min, int quant_max, bool symmetric) {
  const float low = min_lane(r.min, 0.0f), high = max_lane(r.max, 0.0f);
  const float steps = static_cast<float>(quant_max - quant_min);
  if (symmetric) {
    const float scale = max_lane(-low, high) / (steps / 2.0f);
    return {max_lane(kSmallestScale, scale), quant_min < 0 ? 0 : (quant_min + quant_max) / 2};
  }
  const float width = high - low;
  // high - low may overflow where each of them is finite.
  const float raw = is_finite(width) ? width / steps : high / steps - low / steps;
  const float scale = max_lane(kSmallestScale, raw);
  const float zero_point = static_cast<float>(quant_min) - round_even(low / scale);
  const float clamped = min_lane(static_cast<float>(quant_max), max_lane(static_cast<float>(quant_min), zero_point));
  // An infinite range has no zero point; its scale is infinite too and makes every y NaN.
  return {scale, clamped == clamped ? static_cast<int>(clamped) : quant_min};
}

// Both factors are rounded to float32 once, on the host, so that every backend multiplies by the same numbers.
struct EmaFactors {
  float keep, take;
};
QK_HOST_DEVICE EmaFactors ema_factors(double decay) {
  return {static_cast<float>(decay), static_cast<float>(1.0 - decay)};
}

// A batch without a finite range (empty, all NaN, or holding an infinity) leaves the running range as it is.
QK_HOST_DEVICE Range update_running(Range running, Range batch, EmaFactors f) {
  if (!is_seen(batch) || !is_finite(batch)) return running;
  if (!is_seen(running)) running = batch;
  return {running.min * f.keep + batch.min * f.take, running.max * f.keep + batch.max * f.take};
}

}  // namespace quantkern
