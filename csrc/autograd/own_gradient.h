// Whether a backward may write its result over the gradient it was given.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

namespace quantkern {

// Nobody else holds it: no hook, no other reader of the same output, no graph of the backward itself. These are the
// conditions under which the engine adds gradients in place.
inline bool is_ours_to_write(const at::Tensor& grad, c10::SymIntArrayRef strides) {
  return !at::GradMode::is_enabled() && !at::isTensorSubclassLike(grad) && grad.use_count() == 1 &&
         grad.has_storage() && grad.storage().use_count() == 1 && !grad.is_inference() &&
         (grad.is_cpu() || grad.is_cuda()) && grad.is_non_overlapping_and_dense() && grad.sym_strides() == strides;
}

}  // namespace quantkern
