// dorefa_weight on CUDA: checks, layout, allocation, registration. The kernels are in dorefa_weight.cu.
#include <torch/library.h>

#include <ATen/ops/zeros.h>

#include "dorefa_weight.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

at::Tensor dorefa_workspace(const at::Tensor& x) {
  int64_t bytes = 0;
  C10_CUDA_CHECK(dorefa_weight_workspace_bytes(x.numel(), bytes));
  return new_workspace(x, bytes);
}

TensorPair dorefa_weight_cuda(const at::Tensor& x, int64_t bits) {
  check_dorefa(x, bits);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x);
  const at::TensorOptions options = x.options().dtype(at::kFloat);
  if (x.numel() == 0) return {out, at::zeros({}, options)};
  const at::Tensor largest = at::empty({}, options);
  const DorefaWeightArguments arguments = {dtype_of(x), in.const_data_ptr(), out.mutable_data_ptr(),
                                           x.numel(),   dorefa_steps(bits),  largest.mutable_data_ptr<float>()};
  const at::Tensor workspace = dorefa_workspace(x);
  C10_CUDA_CHECK(launch_dorefa_weight(arguments, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {out, largest};
}

at::Tensor dorefa_weight_backward_cuda(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& largest) {
  check_dorefa(x, 2);
  check_gradient(grad, x);
  check_state(largest, x, std::nullopt, at::kFloat, "largest");
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x);
  if (x.numel() == 0) return out;
  // The output of a copied x holds that copy, which is read again after the gradient has been written.
  const at::Tensor kept = in.is_same(out) ? in.clone() : in;
  const at::Tensor above = in_layout_of(grad, out);
  const DorefaWeightBackwardArguments arguments = {
      dtype_of(x), kept.const_data_ptr(),          above.const_data_ptr(), out.mutable_data_ptr(),
      x.numel(),   largest.const_data_ptr<float>()};
  const at::Tensor workspace = dorefa_workspace(x);
  C10_CUDA_CHECK(
      launch_dorefa_weight_backward(arguments, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("dorefa_weight_forward", quantkern::cuda::dorefa_weight_cuda);
  m.impl("dorefa_weight_backward", quantkern::cuda::dorefa_weight_backward_cuda);
}
