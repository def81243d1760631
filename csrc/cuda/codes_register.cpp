// to_codes and from_codes on CUDA: checks, allocation, registration. The kernels are in codes.cu.
#include <torch/library.h>

#include "../common/check_codes.h"
#include "codes.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

TensorPair to_codes_cuda(const at::Tensor& x, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                         int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  axis = check_to_codes(x, scale, zero_point, quant_min, quant_max, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor dense = as_dense(x);
  at::Tensor codes = at::empty_strided(dense.sizes(), dense.strides(), x.options().dtype(at::kByte));
  at::Tensor parameters = at::empty({2 * scale.numel() + 1}, scale.options());
  const at::Tensor scales = scale.contiguous();
  const at::Tensor zero_points = zero_point.has_value() ? zero_point->contiguous() : at::Tensor();
  // One channel may be many to the caller, when an axis has size 1 or nothing lies in x.
  ChannelView view = view_of(dense, axis);
  if (view.channels != scale.numel()) view = {0, scale.numel(), 1};
  const CodesArguments arguments = {view,
                                    static_cast<int>(quant_min),
                                    static_cast<int>(quant_max),
                                    dense.const_data_ptr<float>(),
                                    scales.const_data_ptr<float>(),
                                    zero_points.defined() ? zero_points.const_data_ptr<int>() : nullptr,
                                    codes.mutable_data_ptr<uint8_t>(),
                                    parameters.mutable_data_ptr<float>()};
  C10_CUDA_CHECK(launch_to_codes(arguments, c10::cuda::getCurrentCUDAStream()));
  return {codes, parameters};
}

at::Tensor from_codes_cuda(const at::Tensor& codes, const at::Tensor& parameters, int64_t quant_min,
                           std::optional<int64_t> axis) {
  axis = check_from_codes(codes, parameters, axis);
  const c10::cuda::CUDAGuard guard(codes.device());
  at::Tensor x = at::empty_strided(codes.sizes(), codes.strides(), codes.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_from_codes(codes.const_data_ptr<uint8_t>(), parameters.const_data_ptr<float>(),
                                   x.mutable_data_ptr<float>(), view_of(codes, axis), static_cast<int>(quant_min),
                                   c10::cuda::getCurrentCUDAStream()));
  return x;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("to_codes", quantkern::cuda::to_codes_cuda);
  m.impl("from_codes", quantkern::cuda::from_codes_cuda);
}
