// Launchers of DoReFa's weight transform and its backward.
#pragma once

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

struct DorefaWeightArguments {
  DType dtype;
  const void* x;
  void* y;  // may be x
  int64_t numel;
  float steps;     // 2^bits - 1
  float* largest;  // out: max|x|; with one bit mean|x|
};

struct DorefaWeightBackwardArguments {
  DType dtype;
  const void *x, *grad;
  void* dx;  // neither x nor grad: both are read again after it has been written
  int64_t numel;
  const float* largest;  // of the forward, with more than one bit
};

// Scratch memory the launchers need, 16-byte aligned.
cudaError_t dorefa_weight_workspace_bytes(int64_t numel, int64_t& bytes);

cudaError_t launch_dorefa_weight(const DorefaWeightArguments& arguments, void* workspace, cudaStream_t stream);

cudaError_t launch_dorefa_weight_backward(const DorefaWeightBackwardArguments& arguments, void* workspace,
                                          cudaStream_t stream);

}  // namespace quantkern::cuda
