// clip_activation on CUDA: checks, allocation, registration. The kernel is in clip_activation.cu.
#include <torch/library.h>

#include "clip_activation.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

// out may be in where that is aligned.
void run_clip(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask, double lower, double upper) {
  const ClipArguments arguments = {
      dtype_of(in), in.const_data_ptr(),       out.mutable_data_ptr(),   mask_pointer(mask),
      in.numel(),   static_cast<float>(lower), static_cast<float>(upper)};
  C10_CUDA_CHECK(launch_clip_activation(arguments, c10::cuda::getCurrentCUDAStream()));
}

TensorPair clip_activation_cuda(const at::Tensor& x, double lower, double upper, bool with_mask) {
  check_cuda_input(x);
  check_bounds(lower, upper);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  run_clip(in, out, mask, lower, upper);
  return {out, mask};
}

at::Tensor clip_activation_in_place_cuda(at::Tensor& x, double lower, double upper, bool with_mask) {
  check_cuda_input(x);
  check_bounds(lower, upper);
  check_dense(x, "x");
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor mask = new_mask(x, with_mask);
  if (is_aligned(x)) {
    run_clip(x, x, mask, lower, upper);
  } else {
    const at::Tensor copy = x.clone();
    run_clip(copy, copy, mask, lower, upper);
    x.copy_(copy);
  }
  return mask;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("clip_activation_forward", quantkern::cuda::clip_activation_cuda);
  m.impl("clip_activation_", quantkern::cuda::clip_activation_in_place_cuda);
}
