// binary_matmul on CUDA: checks, allocation, registration. The kernels are in binary_matmul.cu.
#include <torch/library.h>

#include "binary_matmul.cuh"
#include "packed_entry.h"

namespace quantkern::cuda {
namespace {

BinaryMatmulArguments checked_arguments(const at::Tensor& a, const at::Tensor& b, int64_t k,
                                        const std::optional<at::Tensor>& arranged) {
  check_matmul(a, b, k);
  return {const_words(a), const_words(b), a.size(0), b.size(0), k, ones_of(arranged, a, b.size(0))};
}

at::Tensor binary_matmul_cuda(const at::Tensor& a, const at::Tensor& b, int64_t k,
                              const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& arranged) {
  const BinaryMatmulArguments arguments = checked_arguments(a, b, k, arranged);
  check_vector(scale, a, b.size(0), at::kFloat, "scale");
  check_vector(bias, a, b.size(0), at::kFloat, "bias");
  const c10::cuda::CUDAGuard guard(a.device());
  const at::Tensor y = at::empty({a.size(0), b.size(0)}, a.options().dtype(at::kFloat));
  const FloatOutput output = {y.mutable_data_ptr<float>(), floats_of(scale), floats_of(bias), b.size(0), 1};
  C10_CUDA_CHECK(launch_binary_matmul(arguments, output, c10::cuda::getCurrentCUDAStream()));
  return y;
}

at::Tensor binary_matmul_sign_cuda(const at::Tensor& a, const at::Tensor& b, int64_t k, const at::Tensor& threshold,
                                   const at::Tensor& flip, const std::optional<at::Tensor>& arranged) {
  const BinaryMatmulArguments arguments = checked_arguments(a, b, k, arranged);
  check_thresholds(threshold, flip, a, b.size(0));
  const c10::cuda::CUDAGuard guard(a.device());
  const at::Tensor y = at::empty({a.size(0), words_of(b.size(0))}, a.options());
  const SignOutput output = {mutable_words(y), threshold.const_data_ptr<int>(), const_words(flip), b.size(0)};
  C10_CUDA_CHECK(launch_binary_matmul(arguments, output, c10::cuda::getCurrentCUDAStream()));
  return y;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("binary_matmul", quantkern::cuda::binary_matmul_cuda);
  m.impl("binary_matmul_sign", quantkern::cuda::binary_matmul_sign_cuda);
}
