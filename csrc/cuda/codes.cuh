// Launchers of to_codes and from_codes.
#pragma once

#include "launch.cuh"

namespace quantkern::cuda {

// parameters: [scale of every channel, zero point of every channel, 0 or, where something was lost, 1].
struct CodesArguments {
  ChannelView view;
  int quant_min, quant_max;
  const float* x;
  const float* scale;
  const int* zero_point;  // null: 0
  uint8_t* codes;
  float* parameters;
};

cudaError_t launch_to_codes(const CodesArguments& arguments, cudaStream_t stream);

cudaError_t launch_from_codes(const uint8_t* codes, const float* parameters, float* x, const ChannelView& view,
                              int quant_min, cudaStream_t stream);

}  // namespace quantkern::cuda
