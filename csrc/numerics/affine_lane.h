// The formula of affine.h over any lane type. Included inside a namespace: once for scalars (affine.h) and once for
// each CPU instruction set (cpu/foreach_isa.h), because a function may only be inlined into code compiled for the
// same instructions. No include guard on purpose.

// The parameters of one lane, ready for use: inverse = reciprocal_scale(scale).
template <class V>
struct Affine {
  V inverse, scale, zero_point;
};

// Returns y; `rounded` and `clamped` are equal exactly where the gradient passes.
template <class V>
QK_HOST_DEVICE V fake_quantize_lane(V x, const Affine<V>& p, V quant_min, V quant_max, V& rounded, V& clamped) {
  rounded = round_even(x * p.inverse) + p.zero_point;
  clamped = min_lane(quant_max, max_lane(quant_min, rounded));
  return multiply_as_float(clamped - p.zero_point, p.scale);
}

// x within [lower, upper]; NaN stays NaN.
template <class V>
QK_HOST_DEVICE V clip_lane(V x, V lower, V upper) {
  return min_lane(upper, max_lane(lower, x));
}

// The distance from quant_min of what fake_quantize_lane gave, and back: the same product of the same numbers.
template <class V>
QK_HOST_DEVICE V code_lane(V y, const Affine<V>& p, V quant_min) {
  return (round_even(y * p.inverse) + p.zero_point) - quant_min;
}
template <class V>
QK_HOST_DEVICE V decode_lane(V code, const Affine<V>& p, V quant_min) {
  return multiply_as_float((code + quant_min) - p.zero_point, p.scale);
}
