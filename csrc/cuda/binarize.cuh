// Launcher of binarize. Its backward is launch_fake_quantize_backward.
#pragma once

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

struct BinarizeArguments {
  DType dtype;
  const void* x;
  void* y;        // may be x
  uint8_t* mask;  // null: not wanted
  int64_t numel;
};

cudaError_t launch_binarize(const BinarizeArguments& arguments, cudaStream_t stream);

}  // namespace quantkern::cuda
