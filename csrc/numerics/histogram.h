// The bins of an observer's histogram: bin i of a row holds the values in (w * (origin + i - 1), w * (origin + i)] with
// w = 2^exponent. Widths are powers of two and edges multiples of them, so bins merge exactly when the range grows.
#pragma once

#include <cmath>
#include <cstdint>

namespace quantkern {

// Of a bin's width: 2^-124 and its reciprocal are float32 numbers with room on both sides.
constexpr int64_t kSmallestExponent = -124, kLargestExponent = 124;

struct BinGrid {
  int64_t exponent, origin;
  float inverse() const { return std::ldexp(1.0f, static_cast<int>(-exponent)); }
  bool operator==(const BinGrid& other) const { return exponent == other.exponent && origin == other.origin; }
};

// The finest grid, at least as coarse as `exponent`, whose `bins` bins hold low, high and 0.
inline BinGrid grid_for(float low, float high, int64_t bins, int64_t exponent) {
  const double bottom = low < 0 ? low : 0, top = high > 0 ? high : 0;
  int needed = static_cast<int>(kSmallestExponent);
  const double width = (top - bottom) / static_cast<double>(bins - 2);
  if (width > 0) std::frexp(width, &needed);
  int64_t found = needed < kSmallestExponent ? kSmallestExponent : needed;
  found = found > kLargestExponent ? kLargestExponent : found;
  if (found < exponent) found = exponent;
  return {found, static_cast<int64_t>(std::ceil(std::ldexp(bottom, static_cast<int>(-found))))};
}

// Where bin `bin` of one grid lies in a coarser one. It ends at n = origin + bin times the old width and lies in the
// bin that ends at ceil(n / 2^shift) times the new one.
inline int64_t merged_bin(int64_t bin, const BinGrid& from, const BinGrid& to) {
  const int64_t shift = to.exponent - from.exponent;
  return -(-(from.origin + bin) >> (shift < 62 ? shift : 62)) - to.origin;
}

}  // namespace quantkern
