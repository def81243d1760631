// Every operator of quantkern: the table of contents of the library.
//
// An operator comes in up to three parts: `op` is differentiable and what callers use; `op_forward` does the
// work and also returns what the backward needs; `op_backward` is the gradient. Masks hold one bit an element
// (bit i % 8 of byte i / 8) in the order the elements lie in memory, 1 where the gradient passes.
//
// step, start_step: while step < start_step the operation is the identity, forward and backward.
#include <torch/library.h>

TORCH_LIBRARY(quantkern, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis=None, "
      "Tensor? step=None, int start_step=0) -> Tensor");
  m.def("fake_quantize.number(Tensor x, float scale, float zero_point, int quant_min, int quant_max) -> Tensor");
  m.def(
      "fake_quantize_forward(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis, "
      "Tensor? step, int start_step, bool with_mask) -> (Tensor, Tensor)");
  m.def(
      "fake_quantize_forward.number(Tensor x, float scale, float zero_point, int quant_min, int quant_max, "
      "bool with_mask) -> (Tensor, Tensor)");
  // strides: of the x that the mask was made for; the gradient is brought into that order first.
  m.def("fake_quantize_backward(Tensor grad, Tensor mask, SymInt[] strides) -> Tensor");

  // Current min and max of x, their scale and zero point (written to the given tensors), and x fake-quantized.
  m.def(
      "fake_quantize_weight(Tensor x, Tensor(a!) scale, Tensor(b!) zero_point, int quant_min, int quant_max, "
      "bool symmetric, int? axis=None, Tensor? step=None, int start_step=0) -> Tensor");
  m.def(
      "fake_quantize_weight_forward(Tensor x, Tensor(a!) scale, Tensor(b!) zero_point, int quant_min, int quant_max, "
      "bool symmetric, int? axis, Tensor? step, int start_step, bool with_mask) -> (Tensor, Tensor)");

  // The same with an exponential moving average of the range, which stands still while observing is 0.
  m.def(
      "fake_quantize_activation(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) scale, "
      "Tensor(d!) zero_point, Tensor observing, int quant_min, int quant_max, bool symmetric, float ema_decay, "
      "int? axis=None, Tensor? step=None, int start_step=0) -> Tensor");
  m.def(
      "fake_quantize_activation_forward(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) scale, "
      "Tensor(d!) zero_point, Tensor observing, int quant_min, int quant_max, bool symmetric, float ema_decay, "
      "int? axis, Tensor? step, int start_step, bool with_mask) -> (Tensor, Tensor)");
}
