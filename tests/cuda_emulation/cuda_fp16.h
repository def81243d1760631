// __half for the emulation, with the conversions the CPU kernels use.
#pragma once

#include "../../csrc/cpu/float_bits.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return quantkern::to_float(quantkern::Half{value.bits}); }
inline __half __float2half_rn(float value) { return {quantkern::to_half(value).bits}; }
