// fake_quantize_activation on CUDA: checks, layout, allocation, registration. The kernels are in
// fake_quantize_activation.cu.
#include <torch/library.h>

#include "fake_quantize_activation.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

TensorPair fake_quantize_activation_cuda(const at::Tensor& x, at::Tensor& running_min, at::Tensor& running_max,
                                         at::Tensor& scale, at::Tensor& zero_point, const at::Tensor& observing,
                                         int64_t quant_min, int64_t quant_max, bool symmetric, double ema_decay,
                                         std::optional<int64_t> axis, const std::optional<at::Tensor>& step,
                                         int64_t start_step, bool with_mask, std::optional<double> lower,
                                         std::optional<double> upper, std::optional<at::ScalarType> dtype) {
  check_cuda_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_state(running_min, x, axis, at::kFloat, "running_min");
  check_state(running_max, x, axis, at::kFloat, "running_max");
  check_state(scale, x, axis, at::kFloat, "scale");
  check_state(zero_point, x, axis, at::kInt, "zero_point");
  check_state(observing, x, std::nullopt, at::kBool, "observing");
  check_ema_decay(ema_decay);
  check_step(step, x);
  const Clip clip = check_clip(lower, upper, x.scalar_type());
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  at::Tensor mask = new_mask(x, with_mask);
  if (x.numel() == 0) return {out, mask};
  const ActivationArguments arguments = {dtype_of(x),
                                         in.const_data_ptr(),
                                         out.mutable_data_ptr(),
                                         mask_pointer(mask),
                                         view_of(out, axis),
                                         running_min.mutable_data_ptr<float>(),
                                         running_max.mutable_data_ptr<float>(),
                                         scale.mutable_data_ptr<float>(),
                                         zero_point.mutable_data_ptr<int32_t>(),
                                         observing.const_data_ptr<bool>(),
                                         static_cast<int>(quant_min),
                                         static_cast<int>(quant_max),
                                         symmetric,
                                         ema_decay,
                                         {static_cast<float>(clip.lower), static_cast<float>(clip.upper), clip.wanted},
                                         gate_of(step, start_step),
                                         dtype_of(out)};
  int64_t bytes = 0;
  C10_CUDA_CHECK(activation_workspace_bytes(arguments, bytes));
  const at::Tensor workspace = new_workspace(x, bytes);
  C10_CUDA_CHECK(
      launch_fake_quantize_activation(arguments, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("fake_quantize_activation_forward", quantkern::cuda::fake_quantize_activation_cuda);
}
