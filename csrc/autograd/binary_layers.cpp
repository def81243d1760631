// sign_linear and sign_conv2d: layers of signs for training, through the packed kernels of whatever device.
//
// Saved are the packed signs of x and weight, one bit an element. The gradients are those of linear and convolution at
// the signs, in x's dtype; they are unpacked for it one after the other.
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "node.h"
#include "straight_through.h"

namespace quantkern {
namespace {

using torch::autograd::variable_list;
using MaybeTensor = std::optional<at::Tensor>;

struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
};

at::Tensor pack(const at::Tensor& x, int64_t axis) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::pack_signs", "")
                             .typed<at::Tensor(const at::Tensor&, int64_t)>();
  return op.call(x, axis);
}

at::Tensor unpack(const at::Tensor& packed, int64_t k, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::unpack_signs", "")
                             .typed<at::Tensor(const at::Tensor&, int64_t, at::ScalarType)>();
  return op.call(packed, k, dtype);
}

at::Tensor multiply(const at::Tensor& a, const at::Tensor& b, int64_t k, const MaybeTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("quantkern::binary_matmul", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, const MaybeTensor&,
                                               const MaybeTensor&, const MaybeTensor&)>();
  return op.call(a, b, k, std::nullopt, bias, std::nullopt);
}

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, int64_t channels, const Geometry& g,
                    const MaybeTensor& bias, bool channels_last) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("quantkern::binary_conv2d", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, at::IntArrayRef, at::IntArrayRef,
                            at::IntArrayRef, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, bool)>();
  return op.call(x, weight, channels, g.stride, g.padding, g.dilation, std::nullopt, bias, std::nullopt, channels_last);
}

bool is_channels_last(const at::Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

void check_operands(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  TORCH_CHECK_TYPE(x.is_floating_point(), "x must be a floating-point tensor, got ", x.scalar_type(),
                   "; convert it with x.float()");
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype ", x.scalar_type(), ", got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == x.device(), "weight is on ", weight.device(), ", x on ", x.device(),
                    "; move it with weight.to(x.device)");
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                    "bias must be a vector of ", weight.size(0), " values, got shape ",
                    bias.has_value() ? bias->sizes() : at::IntArrayRef());
}

void forbid_second_derivative(const variable_list& grads, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(at::GradMode::is_enabled() && grads[0].requires_grad()), name,
                              " has no second derivative; call backward without create_graph");
}

// What both layers save.
struct SignsNode : public torch::autograd::Node {
  void release_variables() override {
    x.reset_data();
    weight.reset_data();
  }
  torch::autograd::SavedVariable x, weight;
  int64_t k = 0;
  at::ScalarType dtype = at::kFloat;
};

struct SignLinearBackward : public SignsNode {
  variable_list apply(variable_list&& grads) override {
    variable_list out(3);
    if (!grads[0].defined()) return out;
    forbid_second_derivative(grads, "sign_linear");
    at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor& grad = grads[0];
    const int64_t rows = c10::multiply_integers(grad.sizes().slice(0, grad.dim() - 1));
    const at::Tensor flat = grad.reshape({rows, grad.size(-1)});
    if (task_should_compute_output(0)) out[0] = at::matmul(grad, unpack(weight.unpack(), k, dtype));
    if (task_should_compute_output(1)) out[1] = at::matmul(flat.t(), unpack(x.unpack(), k, dtype).view({rows, k}));
    if (task_should_compute_output(2)) out[2] = flat.sum(0);
    return out;
  }
  std::string name() const override { return "QuantkernSignLinearBackward"; }
};

struct SignConv2dBackward : public SignsNode {
  variable_list apply(variable_list&& grads) override {
    variable_list out(3);
    if (!grads[0].defined()) return out;
    forbid_second_derivative(grads, "sign_conv2d");
    at::AutoDispatchBelowADInplaceOrView below;
    // Unpacked images have their channels innermost; the gradient comes in x's own order.
    const auto images = [&](const torch::autograd::SavedVariable& saved) {
      const at::Tensor signs = unpack(saved.unpack(), k, dtype).permute({0, 3, 1, 2});
      return channels_last ? signs : signs.contiguous();
    };
    auto [dx, dweight, dbias] = at::convolution_backward(
        grads[0], images(x), images(weight), at::IntArrayRef{outputs}, geometry.stride, geometry.padding,
        geometry.dilation, false, at::IntArrayRef{0, 0}, 1,
        {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)});
    return {dx, dweight, dbias};
  }
  std::string name() const override { return "QuantkernSignConv2dBackward"; }

  Geometry geometry;
  int64_t outputs = 0;
  bool channels_last = false;
};

// Unlike Tensor::to not an operator where there is nothing to do: kernels may not return what they were given.
at::Tensor with_dtype(const at::Tensor& x, at::ScalarType dtype) { return x.scalar_type() == dtype ? x : x.to(dtype); }

// Sums and biases are added in float32, but for float64 layers: that would round away half the digits of their bias.
MaybeTensor bias_of_sums(const MaybeTensor& bias, at::ScalarType dtype) {
  return bias.has_value() && dtype != at::kDouble ? MaybeTensor(with_dtype(*bias, at::kFloat)) : std::nullopt;
}

at::Tensor layer_output(const at::Tensor& sums, at::ScalarType dtype, const MaybeTensor& bias,
                        at::IntArrayRef bias_sizes) {
  const at::Tensor y = with_dtype(sums, dtype);
  return bias.has_value() && dtype == at::kDouble ? y.add_(bias->view(bias_sizes)) : y;
}

bool any_needs_gradient(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return needs_gradient(x) || needs_gradient(weight) || (bias.defined() && needs_gradient(bias));
}

template <class N>
void attach(const at::Tensor& y, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
            const at::Tensor& packed, const at::Tensor& packed_weight, N node) {
  node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
  node->x = torch::autograd::SavedVariable(packed, /*is_output=*/false);
  node->weight = torch::autograd::SavedVariable(packed_weight, /*is_output=*/false);
  node->dtype = x.scalar_type();
  torch::autograd::set_history(y, node);
}

at::Tensor sign_linear(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && x.dim() > 0 && x.size(-1) == weight.size(1),
                    "x must be [..., K] and weight [N, K], got shapes ", x.sizes(), " and ", weight.sizes());
  check_operands(x, weight, bias);
  const int64_t k = weight.size(1);
  at::Tensor y, packed, packed_weight;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    packed = pack(x, -1);
    packed_weight = pack(weight, -1);
    std::vector<int64_t> sizes = x.sizes().vec();
    const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
    sizes.back() = weight.size(0);
    const MaybeTensor fused = bias_of_sums(bias, x.scalar_type());
    y = multiply(packed.view({rows, packed.size(-1)}), packed_weight, k, fused).view(sizes);
    y = layer_output(y, x.scalar_type(), bias, {-1});
  }
  const at::Tensor added = bias.value_or(at::Tensor());
  if (!any_needs_gradient(x, weight, added)) return y;
  auto node = make_node<SignLinearBackward>();
  node->k = k;
  attach(y, x, weight, added, packed, packed_weight, node);
  return y;
}

at::Tensor sign_conv2d(const at::Tensor& x, const at::Tensor& weight, const MaybeTensor& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && x.size(1) == weight.size(1),
                    "x must be [N, C, H, W] and weight [O, C, kh, kw], got shapes ", x.sizes(), " and ",
                    weight.sizes());
  check_operands(x, weight, bias);
  const Geometry geometry{stride.vec(), padding.vec(), dilation.vec()};
  const bool last = is_channels_last(x);
  at::Tensor y, packed, packed_weight;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    packed = pack(x, 1);
    packed_weight = pack(weight, 1);
    const MaybeTensor fused = bias_of_sums(bias, x.scalar_type());
    y = convolve(packed, packed_weight, x.size(1), geometry, fused, last);
    y = layer_output(y, x.scalar_type(), bias, {-1, 1, 1});
  }
  const at::Tensor added = bias.value_or(at::Tensor());
  if (!any_needs_gradient(x, weight, added)) return y;
  auto node = make_node<SignConv2dBackward>();
  node->k = x.size(1);
  node->geometry = geometry;
  node->outputs = weight.size(0);
  node->channels_last = last;
  attach(y, x, weight, added, packed, packed_weight, node);
  return y;
}

void register_all(torch::Library& m) {
  m.impl("sign_linear", sign_linear);
  m.impl("sign_conv2d", sign_conv2d);
}

}  // namespace
}  // namespace quantkern

TORCH_LIBRARY_IMPL(quantkern, Autograd, m) { quantkern::register_all(m); }
TORCH_LIBRARY_IMPL(quantkern, CompositeExplicitAutograd, m) { quantkern::register_all(m); }
