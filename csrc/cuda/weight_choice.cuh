// From the range of a weight's channel to its scale and zero point, which are written where the caller keeps them.
#pragma once

#include "../numerics/ranges.h"
#include "launch.cuh"

namespace quantkern::cuda {

// Where a channel's result goes.
struct Choice {
  float* scale;
  int* zero_point;
  int quant_min, quant_max;
  bool symmetric;
};

__device__ __forceinline__ ScaleZeroPoint choose(const Range& range, const Choice& c) {
  return choose_scale(range, c.quant_min, c.quant_max, c.symmetric);
}
__device__ __forceinline__ void write(const ScaleZeroPoint& chosen, int64_t channel, const Choice& c) {
  c.scale[channel] = chosen.scale;
  c.zero_point[channel] = chosen.zero_point;
}

}  // namespace quantkern::cuda
