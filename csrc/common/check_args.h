// The argument checks every device shares, with their messages: what was given, what was expected, how to mend it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>

#include "../numerics/affine.h"
#include "../numerics/ranges.h"
#include "dtype.h"

namespace quantkern {

inline void check_input(const at::Tensor& x) { (void)dtype_of(x); }

inline void check_quant_range(int64_t quant_min, int64_t quant_max) {
  TORCH_CHECK_VALUE(-kQuantLimit <= quant_min && quant_min < quant_max && quant_max <= kQuantLimit,
                    "quant_min must be less than quant_max and both within +-", kQuantLimit,
                    ", got quant_min=", quant_min, ", quant_max=", quant_max);
}

// The axis counted from the front, or nothing.
inline std::optional<int64_t> check_axis(const at::Tensor& x, std::optional<int64_t> axis) {
  if (!axis.has_value()) return axis;
  TORCH_CHECK_INDEX(-x.dim() <= *axis && *axis < x.dim(), "axis must lie in [", -x.dim(), ", ", x.dim() - 1, "] for a ",
                    x.dim(), "-dimensional x, got ", *axis);
  return *axis < 0 ? *axis + x.dim() : *axis;
}

// A parameter holds one value, or one a channel; kernels read it as it lies, so it must be contiguous.
inline void check_parameter(const at::Tensor& value, const at::Tensor& x, std::optional<int64_t> axis,
                            const char* name) {
  if (axis.has_value()) {
    TORCH_CHECK_VALUE(value.numel() == x.size(*axis) && value.dim() <= 1, name, " must be a vector of ", x.size(*axis),
                      " values, one a channel of axis ", *axis, ", got shape ", value.sizes());
  } else {
    TORCH_CHECK_VALUE(value.numel() == 1 && value.dim() <= 1, name, " must hold one value, got shape ", value.sizes(),
                      "; for one value a channel give axis");
  }
  TORCH_CHECK_VALUE(value.device() == x.device(), name, " is on ", value.device(), ", x on ", x.device(),
                    "; move it with ", name, ".to(x.device)");
}

inline void check_dtype(const at::Tensor& value, at::ScalarType expected, const char* name) {
  TORCH_CHECK_TYPE(value.scalar_type() == expected, name, " must be ", expected, ", got ", value.scalar_type());
}

inline void check_zero_point_dtype(const at::Tensor& zero_point) {
  TORCH_CHECK_TYPE(zero_point.scalar_type() == at::kInt || zero_point.scalar_type() == at::kFloat,
                   "zero_point must be int32 or float32, got ", zero_point.scalar_type());
}

// The reciprocal of a scale that the host can see.
inline float check_scale_value(double scale) {
  const float inverse = reciprocal_scale(static_cast<float>(scale));
  TORCH_CHECK_VALUE(inverse == inverse, "scale must be positive and finite, got ", scale);
  return inverse;
}

inline void check_zero_point_value(double zero_point, int64_t quant_min, int64_t quant_max) {
  TORCH_CHECK_VALUE(quant_min <= zero_point && zero_point <= quant_max, "zero_point must lie in [", quant_min, ", ",
                    quant_max, "], got ", zero_point);
}

inline void check_step(const std::optional<at::Tensor>& step, const at::Tensor& x) {
  if (!step.has_value()) return;
  check_dtype(*step, at::kLong, "step");
  check_parameter(*step, x, std::nullopt, "step");
}

inline void check_bounds(double lower, double upper) {
  TORCH_CHECK_VALUE(lower < upper, "lower must be less than upper, got lower=", lower, ", upper=", upper);
}

// What x is clipped to before anything else, in x's precision; wanted where the caller gave a bound.
struct Clip {
  double lower = -std::numeric_limits<double>::infinity(), upper = std::numeric_limits<double>::infinity();
  bool wanted = false;
};
inline Clip check_clip(std::optional<double> lower, std::optional<double> upper, at::ScalarType dtype) {
  Clip clip;
  if (!lower.has_value() && !upper.has_value()) return clip;
  clip = {lower.value_or(clip.lower), upper.value_or(clip.upper), true};
  check_bounds(clip.lower, clip.upper);
  for (double* bound : {&clip.lower, &clip.upper}) {
    if (dtype == at::kHalf) *bound = static_cast<float>(c10::Half(static_cast<float>(*bound)));
    if (dtype == at::kBFloat16) *bound = static_cast<float>(c10::BFloat16(static_cast<float>(*bound)));
    if (dtype == at::kFloat) *bound = static_cast<float>(*bound);
  }
  return clip;
}
inline Range clip_range(const Range& range, const Clip& clip) {
  const float lower = static_cast<float>(clip.lower), upper = static_cast<float>(clip.upper);
  if (!clip.wanted || !is_seen(range)) return range;
  return {clip_lane(range.min, lower, upper), clip_lane(range.max, lower, upper)};
}

inline void check_ema_decay(double ema_decay) {
  TORCH_CHECK_VALUE(ema_decay > 0.0 && ema_decay < 1.0, "ema_decay must lie in (0, 1), got ", ema_decay);
}

// A tensor the operator writes its state into.
inline void check_state(const at::Tensor& value, const at::Tensor& x, std::optional<int64_t> axis, at::ScalarType dtype,
                        const char* name) {
  check_dtype(value, dtype, name);
  check_parameter(value, x, axis, name);
  TORCH_CHECK_VALUE(value.is_contiguous(), name, " must be contiguous, since it is written in place; got strides ",
                    value.strides());
}

// One that is written in place as it lies.
inline void check_dense(const at::Tensor& value, const char* name) {
  TORCH_CHECK_VALUE(value.is_non_overlapping_and_dense(), name, " must fill one block of memory, got strides ",
                    value.strides(), " for sizes ", value.sizes());
}

inline void check_gradient(const at::Tensor& grad, const at::Tensor& x) {
  check_dtype(grad, x.scalar_type(), "grad");
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), "grad must have the shape of x, ", x.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_VALUE(grad.device() == x.device(), "grad is on ", grad.device(), ", x on ", x.device());
}

// The type of a result: x's own, or what a float32 x shall become in the same pass.
inline at::ScalarType result_dtype(const at::Tensor& x, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(!dtype.has_value() || dtype == at::kHalf || dtype == at::kBFloat16,
                    "dtype must be float16, bfloat16 or None, got ", *dtype);
  return x.scalar_type() == at::kFloat ? dtype.value_or(at::kFloat) : x.scalar_type();
}

// A gradient that its own backward overwrites.
inline void check_same_memory(const at::Tensor& grad, const at::Tensor& x) {
  check_dense(x, "x");
  TORCH_CHECK_VALUE(grad.strides() == x.strides(), "grad is written in place and must have the strides of x, ",
                    x.strides(), ", got ", grad.strides());
}

// Everything of lsq but the step; returns the axis counted from the front, or nothing.
inline std::optional<int64_t> check_lsq(const at::Tensor& x, const at::Tensor& scale, int64_t quant_min,
                                        int64_t quant_max, std::optional<int64_t> axis,
                                        const std::optional<at::Tensor>& zero_point) {
  check_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_dtype(scale, at::kFloat, "scale");
  check_parameter(scale, x, axis, "scale");
  if (!zero_point.has_value()) return axis;
  check_dtype(*zero_point, at::kFloat, "zero_point");
  check_parameter(*zero_point, x, axis, "zero_point");
  return axis;
}

inline void check_dorefa(const at::Tensor& x, int64_t bits) {
  check_input(x);
  TORCH_CHECK_TYPE(x.scalar_type() != at::kDouble, "DoReFa's kernels take float32, float16 and bfloat16, got float64; ",
                   "convert it with x.float()");
  TORCH_CHECK_VALUE(1 <= bits && bits <= 16, "bits must lie in [1, 16], got ", bits);
}

// n of q(z) = rint(z * n) / n
inline float dorefa_steps(int64_t bits) { return static_cast<float>((int64_t{1} << bits) - 1); }

inline void check_mask(const at::Tensor& grad, const at::Tensor& mask) {
  check_dtype(mask, at::kByte, "mask");
  TORCH_CHECK_VALUE(mask.is_contiguous() && mask.numel() == (grad.numel() + 7) / 8, "mask must hold ",
                    (grad.numel() + 7) / 8, " bytes, one bit an element of grad, got shape ", mask.sizes());
  TORCH_CHECK_VALUE(mask.device() == grad.device(), "mask is on ", mask.device(), ", grad on ", grad.device());
}

}  // namespace quantkern
