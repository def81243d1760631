// packed_max_pool2d on CUDA: checks, allocation, registration. The kernel is in packed_max_pool2d.cu.
#include <torch/library.h>

#include "packed_entry.h"
#include "packed_max_pool2d.cuh"

namespace quantkern::cuda {
namespace {

at::Tensor packed_max_pool2d_cuda(const at::Tensor& x, const at::Tensor& flip, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride, at::IntArrayRef padding) {
  const Window window = check_pool(x, flip, kernel_size, stride, padding);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor y = at::empty({window.images, window.out_height, window.out_width, window.words}, x.options());
  C10_CUDA_CHECK(launch_packed_max_pool2d(const_words(x), const_words(flip), mutable_words(y), window,
                                          c10::cuda::getCurrentCUDAStream()));
  return y;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) { m.impl("packed_max_pool2d", quantkern::cuda::packed_max_pool2d_cuda); }
