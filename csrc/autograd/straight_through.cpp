#include "straight_through.h"

#include "node.h"
#include "own_gradient.h"
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <optional>

namespace quantkern {
namespace {

using torch::autograd::variable_list;

at::Tensor call_backward(const at::Tensor& grad, const at::Tensor& mask, c10::SymIntArrayRef strides) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::fake_quantize_backward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef)>();
  return op.call(grad, mask, strides);
}

void call_backward_in_place(at::Tensor& grad, const at::Tensor& mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::fake_quantize_backward_", "")
                             .typed<void(at::Tensor&, const at::Tensor&)>();
  op.call(grad, mask);
}

struct StraightThroughBackward : public torch::autograd::Node {
  variable_list apply(variable_list&& grads) override {
    at::Tensor grad = std::move(grads[0]);
    if (!grad.defined() || every_gradient_passes) return {grad};
    // Without create_graph the backward needs no derivative of its own.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    if (!is_ours_to_write(grad, strides)) return {call_backward(grad, mask.unpack(), strides)};
    call_backward_in_place(grad, mask.unpack());
    return {grad};
  }
  void release_variables() override { mask.reset_data(); }
  std::string name() const override { return "QuantkernStraightThroughBackward"; }

  torch::autograd::SavedVariable mask;
  c10::SymDimVector strides;
  bool every_gradient_passes = false;
};

// Leads to what comes before x; y is what comes after.
auto new_node(const at::Tensor& x, const at::Tensor& y, const at::Tensor& mask) {
  auto node = make_node<StraightThroughBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  node->every_gradient_passes = mask.sym_numel() == 0 && x.sym_numel() != 0;
  if (!node->every_gradient_passes) {
    node->mask = torch::autograd::SavedVariable(mask, /*is_output=*/false);
    const auto strides = y.sym_strides();
    node->strides.assign(strides.begin(), strides.end());
  }
  return node;
}

// The gradient of fake_quantize_backward itself: it is linear in grad, with the same mask.
at::Tensor fake_quantize_backward_autograd(const at::Tensor& grad, const at::Tensor& mask,
                                           c10::SymIntArrayRef strides) {
  return straight_through(grad, [&](bool) { return TensorPair(call_backward(grad, mask, strides), mask); });
}

}  // namespace

bool needs_gradient(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

void attach_straight_through(const at::Tensor& x, const at::Tensor& y, const at::Tensor& mask) {
  torch::autograd::set_history(y, new_node(x, y, mask));
}

void check_in_place(const at::Tensor& x) { torch::autograd::check_inplace(x, needs_gradient(x)); }

void attach_in_place(at::Tensor& x, const at::Tensor& mask) {
  // The way back is read off x before its version moves: a view would then ask its base for another one.
  NodePtr node;
  if (needs_gradient(x)) node = new_node(x, x, mask);
  if (!x.is_inference()) torch::autograd::impl::bump_version(x);
  if (node) torch::autograd::rebase_history(x, node);
}

}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) {
  m.impl("fake_quantize_backward", quantkern::fake_quantize_backward_autograd);
}
