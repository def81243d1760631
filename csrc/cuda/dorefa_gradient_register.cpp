// dorefa_gradient on CUDA: checks, layout, allocation, registration. The kernels are in dorefa_gradient.cu.
#include <torch/library.h>

#include "dorefa_gradient.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

at::Tensor dorefa_gradient_cuda(const at::Tensor& grad, int64_t bits, const at::Tensor& seed) {
  check_dorefa(grad, bits);
  check_state(seed, grad, std::nullopt, at::kLong, "seed");
  const c10::cuda::CUDAGuard guard(grad.device());
  auto [in, out] = dense_in_out(grad);
  if (grad.numel() == 0) return out;
  const std::optional<int64_t> axis = grad.dim() > 1 ? std::optional<int64_t>(0) : std::nullopt;
  const DorefaGradientArguments arguments = {dtype_of(grad),     in.const_data_ptr(), out.mutable_data_ptr(),
                                             view_of(out, axis), dorefa_steps(bits),  seed.const_data_ptr<int64_t>()};
  int64_t bytes = 0;
  C10_CUDA_CHECK(dorefa_gradient_workspace_bytes(arguments, bytes));
  const at::Tensor workspace = new_workspace(grad, bytes);
  C10_CUDA_CHECK(launch_dorefa_gradient(arguments, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) { m.impl("dorefa_gradient", quantkern::cuda::dorefa_gradient_cuda); }
