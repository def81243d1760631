// Minimum, maximum and sum over a warp or a block, in a fixed order. Every thread gets the result; ranges drop NaN.
#pragma once

#include "../numerics/ranges.h"
#include "vector_io.cuh"

namespace quantkern::cuda {

template <class T>
__device__ __forceinline__ Range range_of(const Group<T>& group) {
  Range range = empty_range();
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const float value = to_float(group.lane[j]);
    range = merge(range, {value, value});
  }
  return range;
}

__device__ __forceinline__ Range warp_range(Range range) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float low = __shfl_xor_sync(0xffffffffu, range.min, distance);
    const float high = __shfl_xor_sync(0xffffffffu, range.max, distance);
    range = merge(range, {low, high});
  }
  return range;
}

// For blocks of whole warps, called by all of their threads. May be called again at once.
__device__ __forceinline__ Range block_range(Range range) {
  __shared__ Range warps[kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  range = warp_range(range);
  if (lane == 0) warps[warp] = range;
  __syncthreads();
  range = lane < static_cast<int>(blockDim.x / kWarp) ? warps[lane] : empty_range();
  __syncthreads();
  return warp_range(range);
}

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// As block_range.
template <class V>
__device__ __forceinline__ V block_sum(V value) {
  __shared__ V warps[kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x / kWarp) ? warps[lane] : V{};
  __syncthreads();
  return warp_sum(value);
}

}  // namespace quantkern::cuda
