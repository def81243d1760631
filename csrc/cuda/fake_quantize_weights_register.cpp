// fake_quantize_weights on CUDA: checks, layout, registration. The kernels are in fake_quantize_weights.cu.
#include <torch/library.h>

#include <vector>

#include "../common/check_lists.h"
#include "fake_quantize_weights.cuh"
#include "host_entry.h"

namespace quantkern::cuda {
namespace {

void fake_quantize_weights_cuda(at::TensorList xs, at::TensorList ys, at::TensorList masks, at::TensorList scales,
                                at::TensorList zero_points, at::IntArrayRef quant_min, at::IntArrayRef quant_max,
                                const c10::List<bool>& symmetric, at::IntArrayRef axes, const TensorListOfMaybe& steps,
                                at::IntArrayRef start_steps) {
  check_weight_lists(xs, ys, masks, scales, zero_points, quant_min, quant_max, symmetric, axes, steps, start_steps);
  if (xs.empty()) return;
  const c10::cuda::CUDAGuard guard(xs[0].device());
  std::vector<at::Tensor> kept;  // what the pointers below point into
  std::vector<WeightArguments> weights;
  for (size_t i = 0; i < xs.size(); ++i) {
    check_cuda_input(xs[i]);
    if (xs[i].numel() == 0) continue;
    const DenseInOut dense = dense_into(xs[i], ys[i]);
    kept.push_back(dense.in);
    weights.push_back({dtype_of(xs[i]), dense.in.const_data_ptr(), dense.out.mutable_data_ptr(), mask_pointer(masks[i]),
                       view_of(dense.out, axis_of(xs[i], axes[i])), scales[i].mutable_data_ptr<float>(),
                       zero_points[i].mutable_data_ptr<int32_t>(), static_cast<int>(quant_min[i]),
                       static_cast<int>(quant_max[i]), symmetric[i], gate_of(steps.get(i), start_steps[i]),
                       dtype_of(dense.out)});
  }
  const int64_t count = static_cast<int64_t>(weights.size());
  int64_t bytes = 0;
  C10_CUDA_CHECK(weights_workspace_bytes(weights.data(), count, bytes));
  const at::Tensor workspace = new_workspace(xs[0], bytes);
  C10_CUDA_CHECK(launch_fake_quantize_weights(weights.data(), count, workspace.mutable_data_ptr(),
                                              c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("fake_quantize_weights_forward", quantkern::cuda::fake_quantize_weights_cuda);
}
