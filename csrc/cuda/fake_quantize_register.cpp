// fake_quantize on CUDA: checks, layout, allocation, registration. The kernels are in fake_quantize.cu.
#include <torch/library.h>

#include "fake_quantize.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

// Everything but the parameters has been checked.
TensorPair run_fake_quantize(const at::Tensor& x, const Parameters& parameters, const Gate& gate, int64_t quant_min,
                             int64_t quant_max, std::optional<int64_t> axis, bool with_mask,
                             std::optional<at::ScalarType> dtype) {
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  at::Tensor mask = new_mask(x, with_mask);
  if (x.numel() == 0) return {out, mask};
  const FakeQuantizeArguments arguments = {dtype_of(x),
                                           in.const_data_ptr(),
                                           out.mutable_data_ptr(),
                                           mask_pointer(mask),
                                           view_of(out, axis),
                                           parameters,
                                           gate,
                                           static_cast<int>(quant_min),
                                           static_cast<int>(quant_max),
                                           /*clip=*/{},
                                           dtype_of(out)};
  C10_CUDA_CHECK(launch_fake_quantize(arguments, c10::cuda::getCurrentCUDAStream()));
  return {out, mask};
}

TensorPair fake_quantize_number_cuda(const at::Tensor& x, double scale, double zero_point, int64_t quant_min,
                                     int64_t quant_max, bool with_mask) {
  check_cuda_input(x);
  check_quant_range(quant_min, quant_max);
  check_scale_value(scale);
  check_zero_point_value(zero_point, quant_min, quant_max);
  const c10::cuda::CUDAGuard guard(x.device());
  Parameters parameters;
  parameters.scale_number = static_cast<float>(scale);
  parameters.zero_point_number = static_cast<float>(zero_point);
  return run_fake_quantize(x, parameters, {}, quant_min, quant_max, std::nullopt, with_mask, std::nullopt);
}

TensorPair fake_quantize_cuda(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                              int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                              const std::optional<at::Tensor>& step, int64_t start_step, bool with_mask,
                              std::optional<at::ScalarType> dtype) {
  check_cuda_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_dtype(scale, at::kFloat, "scale");
  check_zero_point_dtype(zero_point);
  check_parameter(scale, x, axis, "scale");
  check_parameter(zero_point, x, axis, "zero_point");
  check_step(step, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  Parameters parameters;
  parameters.scale = scales.const_data_ptr<float>();
  parameters.zero_point = zero_points.const_data_ptr();
  parameters.zero_point_is_float = zero_points.scalar_type() == at::kFloat;
  return run_fake_quantize(x, parameters, gate_of(step, start_step), quant_min, quant_max, axis, with_mask, dtype);
}

at::Tensor fake_quantize_backward_cuda(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef strides) {
  check_cuda_input(grad);
  check_mask(grad, mask);
  const c10::cuda::CUDAGuard guard(grad.device());
  auto [in, out] = dense_in_out(grad, strides);
  C10_CUDA_CHECK(launch_fake_quantize_backward(dtype_of(grad), in.const_data_ptr(), mask.const_data_ptr<uint8_t>(),
                                               out.mutable_data_ptr(), grad.numel(),
                                               c10::cuda::getCurrentCUDAStream()));
  return out;
}

void fake_quantize_backward_in_place_cuda(at::Tensor& grad, const at::Tensor& mask) {
  check_cuda_input(grad);
  check_dense(grad, "grad");
  check_mask(grad, mask);
  const c10::cuda::CUDAGuard guard(grad.device());
  C10_CUDA_CHECK(launch_fake_quantize_backward(dtype_of(grad), grad.const_data_ptr(), mask.const_data_ptr<uint8_t>(),
                                               grad.mutable_data_ptr(), grad.numel(),
                                               c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("fake_quantize_forward", quantkern::cuda::fake_quantize_cuda);
  m.impl("fake_quantize_forward.number", quantkern::cuda::fake_quantize_number_cuda);
  m.impl("fake_quantize_backward", quantkern::cuda::fake_quantize_backward_cuda);
  m.impl("fake_quantize_backward_", quantkern::cuda::fake_quantize_backward_in_place_cuda);
}
