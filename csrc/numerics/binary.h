// Binary numbers: which bit an element becomes, and what becomes of a dot product of bits.
//
//   bit       1 for x >= 0, so for 0.0 and -0.0; 0 for everything else, so for NaN
//   dot       of two rows of k bits as +-1: k - 2 * popcount(a xor b)
//   value     dot * scale + bias, rounded after each step
//   sign      (dot >= threshold) xor flip
// Packed: 32-bit words, element i is bit i % 32 of word i / 32, padding bits 0.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "platform.h"

namespace quantkern {

constexpr int kWordBits = 32;
// Every sum of this many +-1 is exact in float32.
constexpr int64_t kLongestSum = int64_t{1} << 24;

QK_HOST_DEVICE int64_t words_of(int64_t bits) { return (bits + kWordBits - 1) / kWordBits; }

QK_HOST_DEVICE bool is_plus(float x) { return x >= 0.0f; }
QK_HOST_DEVICE bool is_plus(double x) { return x >= 0.0; }
// Of the bits of a 16-bit float: from +0 to +infinity, or -0.
QK_HOST_DEVICE bool is_plus(Half x) { return x.bits <= 0x7c00u || x.bits == 0x8000u; }
QK_HOST_DEVICE bool is_plus(BFloat16 x) { return x.bits <= 0x7f80u || x.bits == 0x8000u; }

// The bits of a word that hold the elements from word * 32 up to k.
QK_HOST_DEVICE uint32_t bits_in_use(int64_t word, int64_t k) {
  const int64_t left = k - word * kWordBits;
  return left >= kWordBits ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
}

// scale and bias may be null.
QK_HOST_DEVICE float scaled_dot(int32_t dot, const float* scale, const float* bias, int64_t n) {
  float value = static_cast<float>(dot);
  if (scale) value = value * scale[n];
  if (bias) value = value + bias[n];
  return value;
}

QK_HOST_DEVICE bool sign_of_dot(int32_t dot, int32_t threshold, bool flip) { return (dot >= threshold) != flip; }

}  // namespace quantkern
