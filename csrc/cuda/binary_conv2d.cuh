// Launchers of the convolution of packed images.
#pragma once

#include "../numerics/window.h"
#include "binary_output.cuh"

namespace quantkern::cuda {

struct BinaryConv2dArguments {
  const uint32_t* x;       // [images, height, width, words]
  const uint32_t* weight;  // [columns, taps_y, taps_x, words]
  Window window;           // of 32-bit sizes
  int64_t columns, channels;
  const int* weight_ones;  // the ones in each row of weight; null: counted by the kernels
};

// Of int32, for the launchers; 0 where nothing is padded.
int64_t binary_conv2d_workspace_bytes(const BinaryConv2dArguments& arguments);

// A row of the output is a pixel: plane out_height * out_width gives [N, columns, height, width], plane 1 channels
// last.
cudaError_t launch_binary_conv2d(const BinaryConv2dArguments& arguments, const FloatOutput& output, void* workspace,
                                 cudaStream_t stream);
cudaError_t launch_binary_conv2d(const BinaryConv2dArguments& arguments, const SignOutput& output, void* workspace,
                                 cudaStream_t stream);

}  // namespace quantkern::cuda
