// Launcher of DoReFa's stochastic quantization of gradients.
#pragma once

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

struct DorefaGradientArguments {
  DType dtype;
  const void* grad;
  void* out;         // may be grad
  ChannelView view;  // a channel is a sample
  float steps;       // 2^bits - 1
  const int64_t* seed;
};

// Scratch memory the launcher needs, 16-byte aligned.
cudaError_t dorefa_gradient_workspace_bytes(const DorefaGradientArguments& arguments, int64_t& bytes);

cudaError_t launch_dorefa_gradient(const DorefaGradientArguments& arguments, void* workspace, cudaStream_t stream);

}  // namespace quantkern::cuda
