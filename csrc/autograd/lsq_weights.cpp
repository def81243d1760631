// All weights at once on their learned steps: one forward, and a backward for each.
#include <torch/library.h>

#include "lsq.h"
#include "new_results.h"
#include "straight_through.h"

namespace quantkern {
namespace {

using Tensors = std::vector<at::Tensor>;

bool any_needs_gradient(const at::Tensor& x, const at::Tensor& scale) {
  return needs_gradient(x) || needs_gradient(scale);
}

Tensors lsq_weights(at::TensorList xs, at::TensorList scales, at::IntArrayRef quant_min, at::IntArrayRef quant_max,
                    at::ArrayRef<double> grad_scales, at::IntArrayRef axes, std::optional<at::ScalarType> dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::lsq_weights_forward", "")
                             .typed<void(at::TensorList, at::TensorList, at::TensorList, at::IntArrayRef,
                                         at::IntArrayRef, at::IntArrayRef)>();
  TORCH_CHECK_VALUE(grad_scales.size() == xs.size(), "grad_scales must have one entry for each of the ", xs.size(),
                    " tensors in xs, got ", grad_scales.size());
  Tensors ys;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    for (const at::Tensor& x : xs) ys.push_back(new_result(x, dtype));
    op.call(xs, ys, scales, quant_min, quant_max, axes);
  }
  for (size_t i = 0; i < xs.size(); ++i) {
    if (!any_needs_gradient(xs[i], scales[i])) continue;
    const MaybeAxis axis = axes[i] < 0 ? std::nullopt : MaybeAxis(axes[i]);
    attach_lsq(xs[i], ys[i], scales[i], {}, {quant_min[i], quant_max[i], grad_scales[i], axis});
  }
  return ys;
}

at::Tensor lsq_again(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, int64_t quant_min,
                     int64_t quant_max, double grad_scale, MaybeAxis axis) {
  const at::Tensor again = y.detach();
  if (any_needs_gradient(x, scale)) attach_lsq(x, again, scale, {}, {quant_min, quant_max, grad_scale, axis});
  return again;
}

}  // namespace
}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) { m.impl("lsq_weights", quantkern::lsq_weights); }
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) { m.impl("lsq_weights", quantkern::lsq_weights); }
TORCH_LIBRARY_IMPL(quantkern, CompositeImplicitAutograd, m) { m.impl("lsq_again", quantkern::lsq_again); }
