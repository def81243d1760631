// The arithmetic the formulas are written in, for one scalar lane. SIMD types overload the same names
// (csrc/cpu/vec_*.h), so every formula in this folder exists once and runs on scalars and on vectors.
//
// Rounding is to nearest, ties to even. min_lane/max_lane return their second argument when the
// comparison is false, as vminps/vmaxps do: with the data second NaN survives, with it first NaN is dropped.
#pragma once

#include "platform.h"

namespace quantkern {

namespace detail {
// Adding and taking away 1.5 * 2^(mantissa bits) rounds any |v| below the limit, without a library call.
template <class C>
struct RoundingMagic;
template <>
struct RoundingMagic<float> {
  static constexpr float magic = 12582912.0f, limit = 4194304.0f;
};
template <>
struct RoundingMagic<double> {
  static constexpr double magic = 6755399441055744.0, limit = 2251799813685248.0;
};
}  // namespace detail

template <class C>
QK_HOST_DEVICE C round_even(C v) {
  using M = detail::RoundingMagic<C>;
  const bool small = v < M::limit && v > -M::limit;  // false for NaN: it passes through
  return small ? (v + M::magic) - M::magic : v;
}
#if defined(__CUDACC__)
template <>
QK_HOST_DEVICE float round_even<float>(float v) {
#if defined(__CUDA_ARCH__)
  return rintf(v);
#else
  return __builtin_rintf(v);
#endif
}
#endif

template <class C>
QK_HOST_DEVICE C min_lane(C a, C b) {
  return a < b ? a : b;
}
template <class C>
QK_HOST_DEVICE C max_lane(C a, C b) {
  return a > b ? a : b;
}

// A number in the lanes of `like`.
QK_HOST_DEVICE float constant(float like, float value) { return (void)like, value; }

template <class C>
QK_HOST_DEVICE C where_less(C a, C b, C yes, C no) {
  return a < b ? yes : no;
}

QK_HOST_DEVICE float magnitude(float v) { return __builtin_fabsf(v); }
QK_HOST_DEVICE float with_sign_of(float magnitude, float sign) { return __builtin_copysignf(magnitude, sign); }

// 2^n for an integral n from -126 to 127, some number for NaN, which cannot be converted to an integer.
QK_HOST_DEVICE float power_of_two(float n) {
  // 1.5 * 2^23 + 127 + n ends in the bits of the exponent n + 127.
  const float sum = n + 12583039.0f;
  unsigned bits;
  __builtin_memcpy(&bits, &sum, sizeof bits);
  bits <<= 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power;
}

// value * scale in float32, whatever the lane: scale is a float32 number by contract.
QK_HOST_DEVICE float multiply_as_float(float value, float scale) { return value * scale; }
QK_HOST_DEVICE double multiply_as_float(double value, double scale) {
  return static_cast<double>(static_cast<float>(value * scale));
}

QK_HOST_DEVICE bool is_finite(float v) { return v - v == 0.0f; }

}  // namespace quantkern
