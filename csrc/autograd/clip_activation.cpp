// ReLU and its like with one saved bit an element, where torch keeps the whole result for the backward.
#include <torch/library.h>

#include "straight_through.h"

namespace quantkern {
namespace {

at::Tensor clip_activation(const at::Tensor& x, double lower, double upper) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::clip_activation_forward", "")
                             .typed<TensorPair(const at::Tensor&, double, double, bool)>();
  return straight_through(x, [&](bool with_mask) { return op.call(x, lower, upper, with_mask); });
}

at::Tensor clip_activation_in_place(at::Tensor& x, double lower, double upper, bool with_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::clip_activation_", "")
                             .typed<at::Tensor(at::Tensor&, double, double, bool)>();
  return straight_through_in_place(x, [&](bool wanted) { return op.call(x, lower, upper, wanted || with_mask); });
}

}  // namespace
}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) {
  m.impl("clip_activation", quantkern::clip_activation);
  m.impl("clip_activation_", quantkern::clip_activation_in_place);
}
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) { m.impl("clip_activation", quantkern::clip_activation); }
