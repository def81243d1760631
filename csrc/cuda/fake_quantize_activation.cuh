// Launcher of the activation path: range, moving average, scale, zero point, fake-quantize.
#pragma once

#include "../numerics/dtype.h"
#include "fake_quantize.cuh"
#include "launch.cuh"

namespace quantkern::cuda {

struct ActivationArguments {
  DType dtype;
  const void* x;
  void* y;        // may be x
  uint8_t* mask;  // null: not wanted
  ChannelView view;
  float *running_min, *running_max;  // in and out, one a channel
  float* scale;                      // in and out, one a channel
  int* zero_point;                   // in and out, one a channel
  const bool* observing;
  int quant_min, quant_max;
  bool symmetric;
  double ema_decay;
  ClipBounds clip;
  Gate gate;                          // its `blocked` is set by the launcher
  std::optional<DType> y_dtype = {};  // where it is not dtype: a 16-bit type for float32
};

// Scratch memory the launcher needs, 16-byte aligned.
cudaError_t activation_workspace_bytes(const ActivationArguments& arguments, int64_t& bytes);

cudaError_t launch_fake_quantize_activation(const ActivationArguments& arguments, void* workspace, cudaStream_t stream);

}  // namespace quantkern::cuda
