// lsq on CUDA: checks, layout, allocation, registration. The kernels are in lsq.cu and fake_quantize.cu.
#include <torch/library.h>

#include <ATen/ops/zeros.h>

#include "host_entry.h"
#include "lsq.cuh"

namespace quantkern::cuda {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

// Keeps the tensors alive that its pointers point into.
struct LsqParameters {
  LsqParameters(const at::Tensor& scale, const MaybeTensor& zero_point)
      : scale_(scale.contiguous()), zero_point_(zero_point.has_value() ? zero_point->contiguous() : at::Tensor()) {}
  Parameters get() const {
    Parameters parameters;
    parameters.scale = scale_.const_data_ptr<float>();
    if (!zero_point_.defined()) return parameters;
    parameters.zero_point = zero_point_.const_data_ptr<float>();
    parameters.zero_point_is_float = true;
    return parameters;
  }

 private:
  at::Tensor scale_, zero_point_;
};

at::Tensor lsq_cuda(const at::Tensor& x, const at::Tensor& scale, int64_t quant_min, int64_t quant_max,
                    std::optional<int64_t> axis, const MaybeTensor& zero_point, std::optional<at::ScalarType> dtype) {
  check_cuda_input(x);
  axis = check_lsq(x, scale, quant_min, quant_max, axis, zero_point);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  if (x.numel() == 0) return out;
  const LsqParameters parameters(scale, zero_point);
  const FakeQuantizeArguments arguments = {dtype_of(x),
                                           in.const_data_ptr(),
                                           out.mutable_data_ptr(),
                                           /*mask=*/nullptr,
                                           view_of(out, axis),
                                           parameters.get(),
                                           /*gate=*/{},
                                           static_cast<int>(quant_min),
                                           static_cast<int>(quant_max),
                                           /*clip=*/{},
                                           dtype_of(out)};
  C10_CUDA_CHECK(launch_fake_quantize(arguments, c10::cuda::getCurrentCUDAStream()));
  return out;
}

// Zeros where no kernel will write.
at::Tensor new_gradient(const at::Tensor& parameter, bool written) {
  const at::TensorOptions options = parameter.options();
  return written ? at::empty(parameter.sizes(), options) : at::zeros(parameter.sizes(), options);
}

struct LsqGradients {
  at::Tensor dscale, dzero_point;
};

// The arguments are checked; in, above and out are dense with the same strides, and out may be one of them.
LsqGradients run_backward(const at::Tensor& in, const at::Tensor& above, const at::Tensor& out, const at::Tensor& scale,
                          int64_t quant_min, int64_t quant_max, double grad_scale, std::optional<int64_t> axis,
                          const MaybeTensor& zero_point) {
  const bool written = in.numel() > 0, with_zero_point = zero_point.has_value();
  at::Tensor dscale = new_gradient(scale, written);
  at::Tensor dzero = with_zero_point ? new_gradient(*zero_point, written) : at::empty({0}, scale.options());
  if (!written) return {dscale, dzero};
  const LsqParameters parameters(scale, zero_point);
  const LsqBackwardArguments arguments = {dtype_of(in),
                                          in.const_data_ptr(),
                                          above.const_data_ptr(),
                                          out.mutable_data_ptr(),
                                          view_of(out, axis),
                                          parameters.get(),
                                          static_cast<int>(quant_min),
                                          static_cast<int>(quant_max),
                                          grad_scale,
                                          dscale.mutable_data_ptr<float>(),
                                          with_zero_point ? dzero.mutable_data_ptr<float>() : nullptr};
  int64_t bytes = 0;
  C10_CUDA_CHECK(lsq_backward_workspace_bytes(arguments, bytes));
  const at::Tensor workspace = new_workspace(in, bytes);
  C10_CUDA_CHECK(launch_lsq_backward(arguments, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {dscale, dzero};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lsq_backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                                                 const at::Tensor& scale, int64_t quant_min,
                                                                 int64_t quant_max, double grad_scale,
                                                                 std::optional<int64_t> axis,
                                                                 const MaybeTensor& zero_point) {
  check_cuda_input(x);
  axis = check_lsq(x, scale, quant_min, quant_max, axis, zero_point);
  check_gradient(grad, x);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x);
  const at::Tensor above = in_layout_of(grad, out);
  const auto [dscale, dzero] = run_backward(in, above, out, scale, quant_min, quant_max, grad_scale, axis, zero_point);
  return {out, dscale, dzero};
}

std::tuple<at::Tensor, at::Tensor> lsq_backward_in_place_cuda(at::Tensor& grad, const at::Tensor& x,
                                                              const at::Tensor& scale, int64_t quant_min,
                                                              int64_t quant_max, double grad_scale,
                                                              std::optional<int64_t> axis,
                                                              const MaybeTensor& zero_point) {
  check_cuda_input(x);
  axis = check_lsq(x, scale, quant_min, quant_max, axis, zero_point);
  check_gradient(grad, x);
  check_same_memory(grad, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [dscale, dzero] = run_backward(x, grad, grad, scale, quant_min, quant_max, grad_scale, axis, zero_point);
  return {dscale, dzero};
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("lsq_forward", quantkern::cuda::lsq_cuda);
  m.impl("lsq_backward", quantkern::cuda::lsq_backward_cuda);
  m.impl("lsq_backward_", quantkern::cuda::lsq_backward_in_place_cuda);
}
