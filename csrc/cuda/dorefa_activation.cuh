// Launcher of DoReFa's activation transform. Its backward is launch_fake_quantize_backward.
#pragma once

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

struct DorefaActivationArguments {
  DType dtype;
  const void* x;
  void* y;        // may be x
  uint8_t* mask;  // null: not wanted
  int64_t numel;
  float steps;  // 2^bits - 1
};

cudaError_t launch_dorefa_activation(const DorefaActivationArguments& arguments, cudaStream_t stream);

}  // namespace quantkern::cuda
