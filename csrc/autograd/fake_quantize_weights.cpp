// All weights at once: one forward, and a backward for each, so that a gradient is ready as soon as its layer is done.
#include <ATen/core/List.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "new_results.h"
#include "straight_through.h"

namespace quantkern {
namespace {

using Tensors = std::vector<at::Tensor>;
using MaybeTensors = c10::List<std::optional<at::Tensor>>;

struct Weights {
  at::TensorList xs, scales, zero_points;
  at::IntArrayRef quant_min, quant_max;
  const c10::List<bool>& symmetric;
  at::IntArrayRef axes;
  const MaybeTensors& steps;
  at::IntArrayRef start_steps;
  std::optional<at::ScalarType> dtype;

  // As for a single weight: where nothing is ever clipped there is no mask.
  bool wants_mask(size_t i) const {
    const bool known = i < quant_min.size() && i < quant_max.size() && i < symmetric.size();
    return needs_gradient(xs[i]) && known && !(symmetric[i] && quant_min[i] == -quant_max[i]);
  }
};

std::tuple<Tensors, Tensors> run_forward(const Weights& w) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::fake_quantize_weights_forward", "")
                             .typed<void(at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                                         at::IntArrayRef, at::IntArrayRef, const c10::List<bool>&, at::IntArrayRef,
                                         const MaybeTensors&, at::IntArrayRef)>();
  Tensors ys, masks;
  for (size_t i = 0; i < w.xs.size(); ++i) {
    const bool wanted = w.wants_mask(i);
    at::AutoDispatchBelowADInplaceOrView below;
    ys.push_back(new_result(w.xs[i], w.dtype));
    masks.push_back(new_result_mask(w.xs[i], wanted));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(w.xs, ys, masks, w.scales, w.zero_points, w.quant_min, w.quant_max, w.symmetric, w.axes, w.steps,
          w.start_steps);
  return {ys, masks};
}

// Kernels write state through raw pointers; autograd learns of it here.
void mark_written(at::TensorList state) {
  for (const at::Tensor& each : state)
    if (!each.is_inference()) torch::autograd::impl::bump_version(each);
}

std::tuple<Tensors, Tensors> fake_quantize_weights_kept(at::TensorList xs, at::TensorList scales,
                                                        at::TensorList zero_points, at::IntArrayRef quant_min,
                                                        at::IntArrayRef quant_max, const c10::List<bool>& symmetric,
                                                        at::IntArrayRef axes, const MaybeTensors& steps,
                                                        at::IntArrayRef start_steps,
                                                        std::optional<at::ScalarType> dtype) {
  auto results =
      run_forward({xs, scales, zero_points, quant_min, quant_max, symmetric, axes, steps, start_steps, dtype});
  mark_written(scales);
  mark_written(zero_points);
  return results;
}

Tensors fake_quantize_weights(at::TensorList xs, at::TensorList scales, at::TensorList zero_points,
                              at::IntArrayRef quant_min, at::IntArrayRef quant_max, const c10::List<bool>& symmetric,
                              at::IntArrayRef axes, const MaybeTensors& steps, at::IntArrayRef start_steps,
                              std::optional<at::ScalarType> dtype) {
  auto [ys, masks] = fake_quantize_weights_kept(xs, scales, zero_points, quant_min, quant_max, symmetric, axes, steps,
                                                start_steps, dtype);
  for (size_t i = 0; i < xs.size(); ++i)
    if (needs_gradient(xs[i])) attach_straight_through(xs[i], ys[i], masks[i]);
  return ys;
}

at::Tensor fake_quantize_again(const at::Tensor& x, const at::Tensor& y, const at::Tensor& mask) {
  const at::Tensor again = y.detach();
  if (needs_gradient(x)) attach_straight_through(x, again, mask);
  return again;
}

}  // namespace
}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) {
  m.impl("fake_quantize_weights", quantkern::fake_quantize_weights);
  m.impl("fake_quantize_weights_kept", quantkern::fake_quantize_weights_kept);
}
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) {
  m.impl("fake_quantize_weights", quantkern::fake_quantize_weights);
  m.impl("fake_quantize_weights_kept", quantkern::fake_quantize_weights_kept);
}
TORCH_LIBRARY_IMPL(quantkern, CompositeImplicitAutograd, m) {
  m.impl("fake_quantize_again", quantkern::fake_quantize_again);
}
