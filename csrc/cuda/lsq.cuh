// Launcher of the learned step size's backward. Its forward is launch_fake_quantize without a mask.
#pragma once

#include "../numerics/dtype.h"
#include "fake_quantize.cuh"

namespace quantkern::cuda {

struct LsqBackwardArguments {
  DType dtype;
  const void *x, *grad;
  void* dx;  // may be x or grad
  ChannelView view;
  Parameters parameters;  // those of the forward
  int quant_min, quant_max;
  double grad_scale;
  float* dscale;       // out, one a channel
  float* dzero_point;  // out, one a channel; null: not wanted
};

// Scratch memory the launcher needs, 16-byte aligned.
cudaError_t lsq_backward_workspace_bytes(const LsqBackwardArguments& arguments, int64_t& bytes);

cudaError_t launch_lsq_backward(const LsqBackwardArguments& arguments, void* workspace, cudaStream_t stream);

}  // namespace quantkern::cuda
