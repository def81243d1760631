// What the kernels that write y share: the gate, the parameters of a channel, one group of elements.
#pragma once

#include "../numerics/affine.h"
#include "fake_quantize.cuh"
#include "vector_io.cuh"

namespace quantkern::cuda {

__device__ __forceinline__ bool is_open(const Gate& gate) {
  if (gate.step != nullptr && *gate.step < gate.start_step) return false;
  return gate.blocked == nullptr || *gate.blocked == 0;
}

__device__ __forceinline__ Affine<float> make_affine(float scale, float zero_point) {
  return {reciprocal_scale(scale), scale, zero_point};
}

__device__ __forceinline__ Affine<float> affine_of(const Parameters& parameters, int64_t channel) {
  if (parameters.scale == nullptr) return make_affine(parameters.scale_number, parameters.zero_point_number);
  if (parameters.zero_point == nullptr) return make_affine(parameters.scale[channel], parameters.zero_point_number);
  const float zero_point = parameters.zero_point_is_float
                               ? static_cast<const float*>(parameters.zero_point)[channel]
                               : static_cast<float>(static_cast<const int*>(parameters.zero_point)[channel]);
  return make_affine(parameters.scale[channel], zero_point);
}

// Fake-quantizes one element in place and returns its mask bit.
template <class T>
__device__ __forceinline__ unsigned quantize_in_place(T& value, const Affine<float>& affine, float quant_min,
                                                      float quant_max) {
  float rounded, clamped;
  value = from_float<T>(fake_quantize_lane(to_float(value), affine, quant_min, quant_max, rounded, clamped));
  return rounded == clamped ? 1u : 0u;
}

// The same for a group of one channel; returns its mask byte.
template <class T>
__device__ __forceinline__ unsigned quantize_in_place(Group<T>& group, const Affine<float>& affine, float quant_min,
                                                      float quant_max) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) bits |= quantize_in_place(group.lane[j], affine, quant_min, quant_max) << j;
  return bits;
}

// Groups that run over the borders of rows: the channel is followed element by element, one division a group.
template <class T>
__device__ __forceinline__ unsigned quantize_across_rows(Group<T>& group, int64_t begin, const ChannelView& view,
                                                         const Parameters& parameters, float quant_min,
                                                         float quant_max) {
  const int64_t row = begin / view.inner;
  int64_t column = begin - row * view.inner, channel = row % view.channels;
  Affine<float> affine = affine_of(parameters, channel);
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    bits |= quantize_in_place(group.lane[j], affine, quant_min, quant_max) << j;
    if (++column == view.inner) {
      column = 0;
      channel = channel + 1 == view.channels ? 0 : channel + 1;
      affine = affine_of(parameters, channel);
    }
  }
  return bits;
}

// Clips a group; returns the bits of what lies strictly between the bounds.
template <class T>
__device__ __forceinline__ unsigned clip_in_place(Group<T>& group, float lower, float upper) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    const float value = to_float(group.lane[j]);
    bits |= (lower < value && value < upper ? 1u : 0u) << j;
    group.lane[j] = from_float<T>(clip_lane(value, lower, upper));
  }
  return bits;
}

}  // namespace quantkern::cuda
