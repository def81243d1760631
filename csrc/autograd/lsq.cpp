// The learned step size: saved are x, scale and zero point, nothing of our own making.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "lsq.h"
#include "node.h"
#include "own_gradient.h"
#include "straight_through.h"

namespace quantkern {
namespace {

using torch::autograd::variable_list;
using MaybeTensor = std::optional<at::Tensor>;
using MaybeType = std::optional<at::ScalarType>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::Tensor call_forward(const at::Tensor& x, const at::Tensor& scale, const LsqSettings& s,
                        const MaybeTensor& zero_point, MaybeType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::lsq_forward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, MaybeAxis,
                                               const MaybeTensor&, MaybeType)>();
  return op.call(x, scale, s.quant_min, s.quant_max, s.axis, zero_point, dtype);
}

Gradients call_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const LsqSettings& s,
                        const MaybeTensor& zero_point) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::lsq_backward", "")
                             .typed<Gradients(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                                              double, MaybeAxis, const MaybeTensor&)>();
  return op.call(grad, x, scale, s.quant_min, s.quant_max, s.grad_scale, s.axis, zero_point);
}

// Leaves the gradient of x in grad.
Gradients call_backward_in_place(at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const LsqSettings& s,
                                 const MaybeTensor& zero_point) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("quantkern::lsq_backward_", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                                                    double, MaybeAxis, const MaybeTensor&)>();
  auto [dscale, dzero] = op.call(grad, x, scale, s.quant_min, s.quant_max, s.grad_scale, s.axis, zero_point);
  return {grad, dscale, dzero};
}

struct LsqBackward : public torch::autograd::Node {
  variable_list apply(variable_list&& grads) override {
    at::Tensor grad = std::move(grads[0]);
    if (!grad.defined()) return variable_list(3);
    TORCH_CHECK_NOT_IMPLEMENTED(!(at::GradMode::is_enabled() && grad.requires_grad()),
                                "lsq has no second derivative; call backward without create_graph");
    at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor zero = zero_point.unpack(), input = x.unpack();
    const MaybeTensor maybe_zero = zero.defined() ? MaybeTensor(zero) : std::nullopt;
    if (grad.scalar_type() != input.scalar_type()) grad = grad.to(input.scalar_type());  // y was made of a 16-bit type
    const bool in_place = is_ours_to_write(grad, input.sym_strides());
    auto [dx, dscale, dzero] = in_place ? call_backward_in_place(grad, input, scale.unpack(), settings, maybe_zero)
                                        : call_backward(grad, input, scale.unpack(), settings, maybe_zero);
    variable_list out(3);
    if (task_should_compute_output(0)) out[0] = dx;
    if (task_should_compute_output(1)) out[1] = dscale;
    if (zero.defined() && task_should_compute_output(2)) out[2] = dzero;
    return out;
  }
  void release_variables() override {
    x.reset_data();
    scale.reset_data();
    zero_point.reset_data();
  }
  std::string name() const override { return "QuantkernLsqBackward"; }

  torch::autograd::SavedVariable x, scale, zero_point;
  LsqSettings settings{};
};

at::Tensor lsq(const at::Tensor& x, const at::Tensor& scale, int64_t quant_min, int64_t quant_max, double grad_scale,
               MaybeAxis axis, const MaybeTensor& zero_point, MaybeType dtype) {
  const LsqSettings settings{quant_min, quant_max, grad_scale, axis};
  const at::Tensor zero = zero_point.value_or(at::Tensor());
  const bool needed = needs_gradient(x) || needs_gradient(scale) || (zero.defined() && needs_gradient(zero));
  at::Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    y = call_forward(x, scale, settings, zero_point, dtype);
  }
  if (!needed) return y;
  attach_lsq(x, y, scale, zero, settings);
  return y;
}

}  // namespace

void attach_lsq(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, const at::Tensor& zero_point,
                const LsqSettings& settings) {
  auto node = make_node<LsqBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(x, scale, zero_point));
  node->x = torch::autograd::SavedVariable(x, /*is_output=*/false);
  node->scale = torch::autograd::SavedVariable(scale, /*is_output=*/false);
  node->zero_point = torch::autograd::SavedVariable(zero_point, /*is_output=*/false);
  node->settings = settings;
  torch::autograd::set_history(y, node);
}

}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) { m.impl("lsq", quantkern::lsq); }
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) { m.impl("lsq", quantkern::lsq); }
