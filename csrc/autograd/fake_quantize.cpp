// The differentiable fake-quantize operations over their forward and backward kernels. The same functions serve
// where autograd is off (CompositeExplicitAutograd, inference mode); no mask is made then.
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "straight_through.h"

namespace quantkern {
namespace {

using MaybeAxis = std::optional<int64_t>;
using MaybeTensor = std::optional<at::Tensor>;
using MaybeType = std::optional<at::ScalarType>;

template <class Signature>
auto operator_named(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// Kernels write state through raw pointers; autograd learns of it here.
void mark_written(std::initializer_list<at::Tensor> state) {
  for (const at::Tensor& each : state)
    if (!each.is_inference()) torch::autograd::impl::bump_version(each);
}

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t quant_min,
                         int64_t quant_max, MaybeAxis axis, const MaybeTensor& step, int64_t start_step,
                         MaybeType dtype) {
  static const auto op =
      operator_named<TensorPair(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, MaybeAxis,
                                const MaybeTensor&, int64_t, bool, MaybeType)>("quantkern::fake_quantize_forward", "");
  return straight_through(x, [&](bool with_mask) {
    return op.call(x, scale, zero_point, quant_min, quant_max, axis, step, start_step, with_mask, dtype);
  });
}

at::Tensor fake_quantize_number(const at::Tensor& x, double scale, double zero_point, int64_t quant_min,
                                int64_t quant_max) {
  static const auto op = operator_named<TensorPair(const at::Tensor&, double, double, int64_t, int64_t, bool)>(
      "quantkern::fake_quantize_forward", "number");
  return straight_through(
      x, [&](bool with_mask) { return op.call(x, scale, zero_point, quant_min, quant_max, with_mask); });
}

at::Tensor fake_quantize_weight(const at::Tensor& x, at::Tensor& scale, at::Tensor& zero_point, int64_t quant_min,
                                int64_t quant_max, bool symmetric, MaybeAxis axis, const MaybeTensor& step,
                                int64_t start_step, MaybeType dtype) {
  static const auto op = operator_named<TensorPair(const at::Tensor&, at::Tensor&, at::Tensor&, int64_t, int64_t, bool,
                                                   MaybeAxis, const MaybeTensor&, int64_t, bool, MaybeType)>(
      "quantkern::fake_quantize_weight_forward", "");
  // The largest magnitude falls on quant_max itself: nothing is ever clipped, every gradient passes.
  const bool clips = !(symmetric && quant_min == -quant_max);
  at::Tensor y = straight_through(x, [&](bool with_mask) {
    return op.call(x, scale, zero_point, quant_min, quant_max, symmetric, axis, step, start_step, with_mask && clips,
                   dtype);
  });
  mark_written({scale, zero_point});
  return y;
}

at::Tensor fake_quantize_activation(const at::Tensor& x, at::Tensor& running_min, at::Tensor& running_max,
                                    at::Tensor& scale, at::Tensor& zero_point, const at::Tensor& observing,
                                    int64_t quant_min, int64_t quant_max, bool symmetric, double ema_decay,
                                    MaybeAxis axis, const MaybeTensor& step, int64_t start_step,
                                    std::optional<double> lower, std::optional<double> upper, MaybeType dtype) {
  static const auto op = operator_named<TensorPair(
      const at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, const at::Tensor&, int64_t, int64_t, bool,
      double, MaybeAxis, const MaybeTensor&, int64_t, bool, std::optional<double>, std::optional<double>, MaybeType)>(
      "quantkern::fake_quantize_activation_forward", "");
  at::Tensor y = straight_through(x, [&](bool with_mask) {
    return op.call(x, running_min, running_max, scale, zero_point, observing, quant_min, quant_max, symmetric,
                   ema_decay, axis, step, start_step, with_mask, lower, upper, dtype);
  });
  mark_written({running_min, running_max, scale, zero_point});
  return y;
}

void register_all(torch::Library& m) {
  m.impl("fake_quantize", fake_quantize);
  m.impl("fake_quantize.number", fake_quantize_number);
  m.impl("fake_quantize_weight", fake_quantize_weight);
  m.impl("fake_quantize_activation", fake_quantize_activation);
}

}  // namespace
}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) { quantkern::register_all(m); }
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) { quantkern::register_all(m); }
