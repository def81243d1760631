// DoReFa's transforms: the weight saves itself and its largest magnitude (nothing with one bit), the activation a mask.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "node.h"
#include "straight_through.h"

namespace quantkern {
namespace {

using torch::autograd::variable_list;

at::Tensor call_weight_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& largest) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::dorefa_weight_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  return op.call(grad, x, largest);
}

struct DorefaWeightBackward : public torch::autograd::Node {
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined() || bits == 1) return {grads[0]};
    TORCH_CHECK_NOT_IMPLEMENTED(!(at::GradMode::is_enabled() && grads[0].requires_grad()),
                                "dorefa_weight has no second derivative; call backward without create_graph");
    at::AutoDispatchBelowADInplaceOrView below;
    return {call_weight_backward(grads[0], x.unpack(), largest.unpack())};
  }
  void release_variables() override {
    x.reset_data();
    largest.reset_data();
  }
  std::string name() const override { return "QuantkernDorefaWeightBackward"; }

  torch::autograd::SavedVariable x, largest;
  int64_t bits = 0;
};

at::Tensor dorefa_weight(const at::Tensor& x, int64_t bits) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::dorefa_weight_forward", "")
                             .typed<TensorPair(const at::Tensor&, int64_t)>();
  at::Tensor y, largest;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    std::tie(y, largest) = op.call(x, bits);
  }
  if (!needs_gradient(x)) return y;
  auto node = make_node<DorefaWeightBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  node->bits = bits;
  if (bits > 1) {
    node->x = torch::autograd::SavedVariable(x, /*is_output=*/false);
    node->largest = torch::autograd::SavedVariable(largest, /*is_output=*/false);
  }
  torch::autograd::set_history(y, node);
  return y;
}

at::Tensor dorefa_activation(const at::Tensor& x, int64_t bits) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::dorefa_activation_forward", "")
                             .typed<TensorPair(const at::Tensor&, int64_t, bool)>();
  return straight_through(x, [&](bool with_mask) { return op.call(x, bits, with_mask); });
}

void register_all(torch::Library& m) {
  m.impl("dorefa_weight", dorefa_weight);
  m.impl("dorefa_activation", dorefa_activation);
}

}  // namespace
}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) { quantkern::register_all(m); }
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) { quantkern::register_all(m); }
