// __nv_bfloat16 for the emulation, with the conversions the CPU kernels use.
#pragma once

#include "../../csrc/cpu/float_bits.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return quantkern::to_float(quantkern::BFloat16{value.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {quantkern::to_bfloat16(value).bits}; }
