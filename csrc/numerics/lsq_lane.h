// The gradient of a learned step size over any lane type (Esser et al. 2020, eq. 3 and 5), with a zero point that may
// be learned too. Its forward is fake_quantize_lane. Included inside a namespace like affine_lane.h; no include guard.
//
//   v = x / scale, p = v + zero_point; inside: quant_min < p < quant_max
//   dx          = grad inside, 0 outside
//   dscale     += grad * (rint(v) - v) inside, grad * (quant_min - zero_point) below, (quant_max - zero_point) above
//   dzero_point += 0 inside, -scale * grad outside
//
// NaN counts as below.

template <class V>
struct LsqGradient {
  V dx, dscale, dzero_point;
};

template <class V>
QK_HOST_DEVICE LsqGradient<V> lsq_gradient_lane(V x, V grad, const Affine<V>& p, V quant_min, V quant_max, V zero) {
  const V v = x * p.inverse, position = v + p.zero_point;
  const V not_above = where_less(position, quant_max, round_even(v) - v, quant_max - p.zero_point);
  const V by_scale = where_less(quant_min, position, not_above, quant_min - p.zero_point);
  const V outside = zero - p.scale * grad;
  return {where_less(quant_min, position, where_less(position, quant_max, grad, zero), zero), grad * by_scale,
          where_less(quant_min, position, where_less(position, quant_max, zero, outside), outside)};
}
