// Launcher of the weight path: current range, scale, zero point, fake-quantize.
#pragma once

#include <optional>

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

struct WeightArguments {
  DType dtype;
  const void* x;
  void* y;        // may be x
  uint8_t* mask;  // null: not wanted
  ChannelView view;
  float* scale;     // out, one a channel
  int* zero_point;  // out, one a channel
  int quant_min, quant_max;
  bool symmetric;
  Gate gate;
  std::optional<DType> y_dtype = {};  // where it is not dtype: a 16-bit type for float32
};

// Scratch memory the launcher needs, 16-byte aligned; 0 where one kernel does everything.
cudaError_t weight_workspace_bytes(const WeightArguments& arguments, int64_t& bytes);

cudaError_t launch_fake_quantize_weight(const WeightArguments& arguments, void* workspace, cudaStream_t stream);

}  // namespace quantkern::cuda
