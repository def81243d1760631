// lsq_weights on CUDA: checks, layout, registration. The kernel is in lsq_weights.cu.
#include <torch/library.h>

#include <vector>

#include "../common/check_lists.h"
#include "host_entry.h"
#include "lsq_weights.cuh"

namespace quantkern::cuda {
namespace {

void lsq_weights_cuda(at::TensorList xs, at::TensorList ys, at::TensorList scales, at::IntArrayRef quant_min,
                      at::IntArrayRef quant_max, at::IntArrayRef axes) {
  check_lsq_lists(xs, ys, scales, quant_min, quant_max, axes);
  if (xs.empty()) return;
  const c10::cuda::CUDAGuard guard(xs[0].device());
  std::vector<at::Tensor> kept;  // what the pointers below point into
  std::vector<FakeQuantizeArguments> weights;
  for (size_t i = 0; i < xs.size(); ++i) {
    check_cuda_input(xs[i]);
    if (xs[i].numel() == 0) continue;
    const DenseInOut dense = dense_into(xs[i], ys[i]);
    kept.push_back(dense.in);
    Parameters parameters;
    parameters.scale = kept.emplace_back(scales[i].contiguous()).const_data_ptr<float>();
    weights.push_back({dtype_of(xs[i]), dense.in.const_data_ptr(), dense.out.mutable_data_ptr(), /*mask=*/nullptr,
                       view_of(dense.out, axis_of(xs[i], axes[i])), parameters, /*gate=*/{},
                       static_cast<int>(quant_min[i]), static_cast<int>(quant_max[i]), /*clip=*/{},
                       dtype_of(dense.out)});
  }
  C10_CUDA_CHECK(
      launch_lsq_weights(weights.data(), static_cast<int64_t>(weights.size()), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) { m.impl("lsq_weights_forward", quantkern::cuda::lsq_weights_cuda); }
