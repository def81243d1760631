// What the torch-aware entries of the CUDA operations share. Never included by a kernel file.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <tuple>

#include "../common/check_args.h"
#include "../common/layout.h"
#include "launch.cuh"

namespace quantkern::cuda {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// check_input for a CUDA tensor: there are no float64 kernels.
inline void check_cuda_input(const at::Tensor& x) {
  check_input(x);
  TORCH_CHECK_TYPE(x.scalar_type() != at::kDouble, "x on ", x.device(), " must be float32, float16 or bfloat16, got ",
                   "float64; convert it with x.float(), or use float64 on the CPU");
}

inline ChannelView view_of(const at::Tensor& dense, std::optional<int64_t> axis) {
  const Layout layout = layout_of(dense, axis);
  return {layout.outer, layout.channels, layout.inner};
}

inline Gate gate_of(const std::optional<at::Tensor>& step, int64_t start_step) {
  Gate gate;
  if (step.has_value()) gate.step = step->const_data_ptr<int64_t>();
  gate.start_step = start_step;
  return gate;
}

// Whether kernels may write x 16 bytes at a time; fresh tensors always are.
inline bool is_aligned(const at::Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

inline uint8_t* mask_pointer(const at::Tensor& mask) {
  return mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
}

// Scratch memory on x's device for the current stream.
inline at::Tensor new_workspace(const at::Tensor& x, int64_t bytes) {
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

}  // namespace quantkern::cuda
