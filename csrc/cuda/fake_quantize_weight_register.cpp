// fake_quantize_weight on CUDA: checks, layout, allocation, registration. The kernels are in fake_quantize_weight.cu.
#include <torch/library.h>

#include "fake_quantize_weight.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

TensorPair fake_quantize_weight_cuda(const at::Tensor& x, at::Tensor& scale, at::Tensor& zero_point, int64_t quant_min,
                                     int64_t quant_max, bool symmetric, std::optional<int64_t> axis,
                                     const std::optional<at::Tensor>& step, int64_t start_step, bool with_mask,
                                     std::optional<at::ScalarType> dtype) {
  check_cuda_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_state(scale, x, axis, at::kFloat, "scale");
  check_state(zero_point, x, axis, at::kInt, "zero_point");
  check_step(step, x);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  at::Tensor mask = new_mask(x, with_mask);
  if (x.numel() == 0) return {out, mask};
  const WeightArguments arguments = {dtype_of(x),
                                     in.const_data_ptr(),
                                     out.mutable_data_ptr(),
                                     mask_pointer(mask),
                                     view_of(out, axis),
                                     scale.mutable_data_ptr<float>(),
                                     zero_point.mutable_data_ptr<int32_t>(),
                                     static_cast<int>(quant_min),
                                     static_cast<int>(quant_max),
                                     symmetric,
                                     gate_of(step, start_step),
                                     dtype_of(out)};
  int64_t bytes = 0;
  C10_CUDA_CHECK(weight_workspace_bytes(arguments, bytes));
  const at::Tensor workspace = new_workspace(x, bytes);
  C10_CUDA_CHECK(
      launch_fake_quantize_weight(arguments, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("fake_quantize_weight_forward", quantkern::cuda::fake_quantize_weight_cuda);
}
