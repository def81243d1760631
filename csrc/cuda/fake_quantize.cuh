// Launchers of the fake-quantize kernels: pointers, sizes and a stream, no torch.
#pragma once

#include <optional>

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

// One scale and zero point, or one a channel: device arrays, or a number for each of them that is null.
struct Parameters {
  const float* scale = nullptr;
  const void* zero_point = nullptr;  // int32, or float32; a number where scale is one
  bool zero_point_is_float = false;
  float scale_number = 1.0f, zero_point_number = 0.0f;
};

// x is first clipped to [lower, upper] where `wanted`, and the mask is 0 at and beyond them.
struct ClipBounds {
  float lower = 0.0f, upper = 0.0f;
  bool wanted = false;
};

struct FakeQuantizeArguments {
  DType dtype;
  const void* x;
  void* y;        // may be x
  uint8_t* mask;  // null: not wanted
  ChannelView view;
  Parameters parameters;
  Gate gate;
  int quant_min, quant_max;
  ClipBounds clip = {};
  std::optional<DType> y_dtype = {};  // where it is not dtype: a 16-bit type for float32
};

cudaError_t launch_fake_quantize(const FakeQuantizeArguments& arguments, cudaStream_t stream);

// out = grad where the mask's bit is set, else 0; out may be grad.
cudaError_t launch_fake_quantize_backward(DType dtype, const void* grad, const uint8_t* mask, void* out, int64_t numel,
                                          cudaStream_t stream);

}  // namespace quantkern::cuda
