// The sign with its straight-through gradient: one bit an element is saved, or nothing where every gradient passes.
#include <torch/library.h>

#include "straight_through.h"

namespace quantkern {
namespace {

at::Tensor binarize(const at::Tensor& x, bool clip_gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::binarize_forward", "")
                             .typed<TensorPair(const at::Tensor&, bool)>();
  return straight_through(x, [&](bool with_mask) { return op.call(x, with_mask && clip_gradient); });
}

}  // namespace
}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) { m.impl("binarize", quantkern::binarize); }
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) { m.impl("binarize", quantkern::binarize); }
