// dorefa_activation on CUDA: checks, allocation, registration. The kernel is in dorefa_activation.cu.
#include <torch/library.h>

#include "dorefa_activation.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

TensorPair dorefa_activation_cuda(const at::Tensor& x, int64_t bits, bool with_mask) {
  check_dorefa(x, bits);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  const DorefaActivationArguments arguments = {dtype_of(x),        in.const_data_ptr(), out.mutable_data_ptr(),
                                               mask_pointer(mask), x.numel(),           dorefa_steps(bits)};
  C10_CUDA_CHECK(launch_dorefa_activation(arguments, c10::cuda::getCurrentCUDAStream()));
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) { m.impl("dorefa_activation_forward", quantkern::cuda::dorefa_activation_cuda); }
