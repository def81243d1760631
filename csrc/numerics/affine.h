// Affine fake-quantization of one lane (Jacob et al. 2018, eq. 1 and section 3; ties to even as in torch):
//
//   q = clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max)
//   y = (q - zero_point) * scale
//
// The straight-through gradient passes where the rounded value lies in [quant_min, quant_max].
// NaN stays NaN with gradient 0, +-inf saturates.
#pragma once

#include "lanes.h"

namespace quantkern {

// Bounds of quant_min and quant_max: every q and q - zero_point is then exact in float32.
constexpr int kQuantLimit = 1 << 20;

// 1 / scale, or NaN, which turns every y into NaN, where the scale is unusable: it must be positive and finite, and so
// must its reciprocal.
QK_HOST_DEVICE float reciprocal_scale(float scale) {
  const float inverse = 1.0f / scale;
  return scale > 0.0f && is_finite(scale) && is_finite(inverse) ? inverse : __builtin_nanf("");
}

#include "affine_lane.h"

}  // namespace quantkern
