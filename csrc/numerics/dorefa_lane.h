// DoReFa-Net's transforms over any lane type (Zhou et al. 2016, sections 2.3 to 2.5). Included inside a namespace like
// affine_lane.h; no include guard.
//
//   q(z) = rint(z * n) / n, n = 2^bits - 1
//   weight      y = 2 * q(tanh(w) / (2 * m) + 1/2) - 1, m = tanh(max|w|)
//   activation  y = q(clip(x, 0, 1))

// tanh to 1.4 units in the last place, the same operations everywhere: an odd polynomial near 0, 1 - 2 / (e^2x + 1)
// elsewhere. Both polynomials interpolate at Chebyshev points, their coefficients rounded to float32.
template <class V>
QK_HOST_DEVICE V tanh_lane(V x) {
  const V a = magnitude(x), u = x * x;
  V p = constant(x, 0.0021274355240166187f);
  p = p * u + constant(x, -0.008157853037118912f);
  p = p * u + constant(x, 0.02169126458466053f);
  p = p * u + constant(x, -0.05394458398222923f);
  p = p * u + constant(x, 0.13333182036876678f);
  p = p * u + constant(x, -0.333333283662796f);
  p = p * u + constant(x, 1.0f);
  // e^t with t = 2|x| = n ln 2 + r; beyond 10 tanh is 1 in float32.
  const V t = min_lane(constant(x, 10.0f), a) * constant(x, 2.0f);
  const V n = round_even(t * constant(x, 1.4426950408889634f));
  const V r = (t - n * constant(x, 0.693359375f)) - n * constant(x, -2.12194440e-4f);
  V e = constant(x, 0.0013941108481958508f);
  e = e * r + constant(x, 0.00837512593716383f);
  e = e * r + constant(x, 0.04166635125875473f);
  e = e * r + constant(x, 0.16666415333747864f);
  e = e * r + constant(x, 0.5f);
  e = e * r + constant(x, 1.0f);
  e = e * r + constant(x, 1.0f);
  const V large = constant(x, 1.0f) - constant(x, 2.0f) / (e * power_of_two(n) + constant(x, 1.0f));
  return where_less(a, constant(x, 0.625f), x * p, with_sign_of(large, x));
}

// width = 2 * m, steps = n
template <class V>
QK_HOST_DEVICE V dorefa_weight_lane(V w, V width, V steps) {
  const V z = tanh_lane(w) / width + constant(w, 0.5f);
  return constant(w, 2.0f) * (round_even(z * steps) / steps) - constant(w, 1.0f);
}

// The gradient of w but for the part that goes through m; t receives tanh(w), of which the other part is made.
template <class V>
QK_HOST_DEVICE V dorefa_weight_gradient_lane(V w, V grad, V largest, V& t) {
  t = tanh_lane(w);
  return grad / largest * (constant(w, 1.0f) - t * t);
}

template <class V>
QK_HOST_DEVICE V dorefa_activation_lane(V x, V zero, V one, V steps) {
  // + zero: -0 becomes +0, also where rounding would keep its sign.
  return round_even((min_lane(one, max_lane(zero, x)) + zero) * steps) / steps;
}

// 2 M (q(g / (2 M) + 1/2 + noise / n) - 1/2); width = 2 * M, noise in [-1/2, 1/2)
template <class V>
QK_HOST_DEVICE V dorefa_gradient_lane(V grad, V width, V steps, V noise, V zero) {
  const V half = constant(grad, 0.5f);
  const V q = min_lane(steps, max_lane(zero, round_even((grad / width + half) * steps + noise)));
  return (q / steps - half) * width;
}
