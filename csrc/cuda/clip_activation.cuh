// Launcher of clip_activation. Its backward is launch_fake_quantize_backward.
#pragma once

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

struct ClipArguments {
  DType dtype;
  const void* x;
  void* y;        // may be x
  uint8_t* mask;  // null: not wanted
  int64_t numel;
  float lower, upper;
};

cudaError_t launch_clip_activation(const ClipArguments& arguments, cudaStream_t stream);

}  // namespace quantkern::cuda
