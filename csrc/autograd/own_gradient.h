// Whether a backward may write its result over the gradient it was given.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

namespace quantkern {

// A reshape in the backward leaves a view, which keeps the tensor it was made of alive: that one is nobody's either
// where only the view knows it.
inline bool is_only_owner(const at::Tensor& grad) {
  const auto owners = grad.storage().use_count();
  if (owners == 1) return true;
  const auto* view = torch::autograd::impl::get_view_autograd_meta(grad);
  if (owners != 2 || view == nullptr || !view->has_bw_view()) return false;
  if (view->has_fw_view() && !view->shared_view_info()) return false;
  const at::Tensor& base = view->get_backward_view().base_;
  return base.use_count() == 1 && base.is_alias_of(grad);
}

// Nobody else holds it: no hook, no other reader of the same output, no graph of the backward itself. These are the
// conditions under which the engine adds gradients in place.
inline bool is_ours_to_write(const at::Tensor& grad, c10::SymIntArrayRef strides) {
  return !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad) && grad.use_count() == 1 &&
         grad.has_storage() && !grad.is_inference() && (grad.is_cpu() || grad.is_cuda()) &&
         grad.is_non_overlapping_and_dense() && grad.sym_strides() == strides && is_only_owner(grad);
}

}  // namespace quantkern
