// float16 and bfloat16 to and from float32 on the host, one value at a time; rounding to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "../numerics/dtype.h"
#include "../numerics/platform.h"

namespace quantkern {

QK_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
QK_HOST_DEVICE uint32_t bits_of_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

QK_HOST_DEVICE float to_float(float x) { return x; }

QK_HOST_DEVICE float to_float(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

QK_HOST_DEVICE BFloat16 to_bfloat16(float f) {
  if (f != f) return {0x7fc0};
  const uint32_t bits = bits_of_float(f);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

QK_HOST_DEVICE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Moving the exponent by a multiplication also brings denormals to their value.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

QK_HOST_DEVICE Half to_half(float f) {
  const uint32_t bits = bits_of_float(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the denormal's bits at the end of the mantissa
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// What a kernel stores for a computed value.
template <class T, class C>
QK_HOST_DEVICE T from_compute(C value) {
  return static_cast<T>(value);
}
template <>
QK_HOST_DEVICE Half from_compute<Half, float>(float value) {
  return to_half(value);
}
template <>
QK_HOST_DEVICE BFloat16 from_compute<BFloat16, float>(float value) {
  return to_bfloat16(value);
}

}  // namespace quantkern
