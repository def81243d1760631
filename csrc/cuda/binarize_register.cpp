// binarize on CUDA: checks, allocation, registration. The kernel is in binarize.cu.
#include <torch/library.h>

#include "binarize.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

TensorPair binarize_cuda(const at::Tensor& x, bool with_mask) {
  check_cuda_input(x);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  const BinarizeArguments arguments = {dtype_of(x), in.const_data_ptr(), out.mutable_data_ptr(), mask_pointer(mask),
                                       x.numel()};
  C10_CUDA_CHECK(launch_binarize(arguments, c10::cuda::getCurrentCUDAStream()));
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) { m.impl("binarize_forward", quantkern::cuda::binarize_cuda); }
