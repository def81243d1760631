// Every operator of quantkern: the table of contents of the library.
//
// An operator comes in up to three parts: `op` is differentiable and what callers use; `op_forward` does the
// work and also returns what the backward needs; `op_backward` is the gradient. Masks hold one bit an element
// (bit i % 8 of byte i / 8) in the order the elements lie in memory, 1 where the gradient passes.
//
// step, start_step: while step < start_step the operation is the identity, forward and backward.
#include <torch/library.h>

TORCH_LIBRARY(quantkern, m) {
  // dtype, wherever there is one: float16 or bfloat16, what a float32 x becomes in the same pass.
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis=None, "
      "Tensor? step=None, int start_step=0, ScalarType? dtype=None) -> Tensor");
  m.def("fake_quantize.number(Tensor x, float scale, float zero_point, int quant_min, int quant_max) -> Tensor");
  m.def(
      "fake_quantize_forward(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis, "
      "Tensor? step, int start_step, bool with_mask, ScalarType? dtype=None) -> (Tensor, Tensor)");
  m.def(
      "fake_quantize_forward.number(Tensor x, float scale, float zero_point, int quant_min, int quant_max, "
      "bool with_mask) -> (Tensor, Tensor)");
  // strides: of the x that the mask was made for; the gradient is brought into that order first.
  m.def("fake_quantize_backward(Tensor grad, Tensor mask, SymInt[] strides) -> Tensor");
  // The same where grad, which must be dense, is nobody else's: where every gradient passes only the mask is read.
  m.def("fake_quantize_backward_(Tensor(a!) grad, Tensor mask) -> ()");

  // Current min and max of x, their scale and zero point (written to the given tensors), and x fake-quantized.
  m.def(
      "fake_quantize_weight(Tensor x, Tensor(a!) scale, Tensor(b!) zero_point, int quant_min, int quant_max, "
      "bool symmetric, int? axis=None, Tensor? step=None, int start_step=0, ScalarType? dtype=None) -> Tensor");
  m.def(
      "fake_quantize_weight_forward(Tensor x, Tensor(a!) scale, Tensor(b!) zero_point, int quant_min, int quant_max, "
      "bool symmetric, int? axis, Tensor? step, int start_step, bool with_mask, ScalarType? dtype=None) -> (Tensor, "
      "Tensor)");

  // The same for all weights of a model at once. axes: counted from the front, -1 for a whole tensor. The forward
  // writes into tensors that are there; an empty mask is not wanted. `kept` also gives the masks.
  m.def(
      "fake_quantize_weights(Tensor[] xs, Tensor(a!)[] scales, Tensor(b!)[] zero_points, int[] quant_min, "
      "int[] quant_max, bool[] symmetric, int[] axes, Tensor?[] steps, int[] start_steps, ScalarType? dtype=None) -> "
      "Tensor[]");
  m.def(
      "fake_quantize_weights_kept(Tensor[] xs, Tensor(a!)[] scales, Tensor(b!)[] zero_points, int[] quant_min, "
      "int[] quant_max, bool[] symmetric, int[] axes, Tensor?[] steps, int[] start_steps, ScalarType? dtype=None) -> "
      "(Tensor[], Tensor[])");
  m.def(
      "fake_quantize_weights_forward(Tensor[] xs, Tensor(a!)[] ys, Tensor(b!)[] masks, Tensor(c!)[] scales, "
      "Tensor(d!)[] zero_points, int[] quant_min, int[] quant_max, bool[] symmetric, int[] axes, Tensor?[] steps, "
      "int[] start_steps) -> ()");
  // y, made of x earlier, as a result of its own: the same memory, a new backward. An empty mask of a tensor that has
  // elements: every gradient passes.
  m.def("fake_quantize_again(Tensor x, Tensor(a) y, Tensor mask) -> Tensor(a)");

  // The same with an exponential moving average of the range, which stands still while observing is 0. With lower and
  // upper: of clip_activation(x, lower, upper), in as many passes as without.
  m.def(
      "fake_quantize_activation(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) scale, "
      "Tensor(d!) zero_point, Tensor observing, int quant_min, int quant_max, bool symmetric, float ema_decay, "
      "int? axis=None, Tensor? step=None, int start_step=0, float? lower=None, float? upper=None, "
      "ScalarType? dtype=None) -> Tensor");
  m.def(
      "fake_quantize_activation_forward(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) scale, "
      "Tensor(d!) zero_point, Tensor observing, int quant_min, int quant_max, bool symmetric, float ema_decay, "
      "int? axis, Tensor? step, int start_step, bool with_mask, float? lower=None, float? upper=None, "
      "ScalarType? dtype=None) -> (Tensor, Tensor)");

  // ReLU (0, inf), ReLU6 (0, 6), Hardtanh: x within [lower, upper], with the gradient strictly between them.
  m.def("clip_activation(Tensor x, float lower, float upper) -> Tensor");
  m.def("clip_activation_forward(Tensor x, float lower, float upper, bool with_mask) -> (Tensor, Tensor)");
  // The same over x, which must be dense; returns the mask. Differentiable too: the mask is made where autograd asks.
  m.def("clip_activation_(Tensor(a!) x, float lower, float upper, bool with_mask=False) -> Tensor");

  // A fake-quantized float32 x as one byte an element and what makes it x again: the scales, the zero points, and a
  // last number that is 0. Where x does not lie on the grid to the last bit the CPU gives no codes at all, and
  // elsewhere that number is 1, which makes every decoded value NaN.
  m.def(
      "to_codes(Tensor x, Tensor scale, Tensor? zero_point, int quant_min, int quant_max, int? axis) -> (Tensor, "
      "Tensor)");
  m.def("from_codes(Tensor codes, Tensor parameters, int quant_min, int? axis) -> Tensor");

  // Learned step size. zero_point: learned too where given, else 0.
  m.def(
      "lsq(Tensor x, Tensor scale, int quant_min, int quant_max, float grad_scale, int? axis=None, "
      "Tensor? zero_point=None, ScalarType? dtype=None) -> Tensor");
  m.def(
      "lsq_forward(Tensor x, Tensor scale, int quant_min, int quant_max, int? axis, Tensor? zero_point, "
      "ScalarType? dtype=None) -> Tensor");
  // Gradients of x, scale and zero point, the last one empty without a zero point.
  m.def(
      "lsq_backward(Tensor grad, Tensor x, Tensor scale, int quant_min, int quant_max, float grad_scale, int? axis, "
      "Tensor? zero_point) -> (Tensor, Tensor, Tensor)");
  // The gradient of x written over grad, which has the strides of a dense x.
  m.def(
      "lsq_backward_(Tensor(a!) grad, Tensor x, Tensor scale, int quant_min, int quant_max, float grad_scale, "
      "int? axis, Tensor? zero_point) -> (Tensor, Tensor)");

  // The same for all weights of a model at once, and y as a result of its own, as above.
  m.def(
      "lsq_weights(Tensor[] xs, Tensor[] scales, int[] quant_min, int[] quant_max, float[] grad_scales, int[] axes, "
      "ScalarType? dtype=None) -> Tensor[]");
  m.def(
      "lsq_weights_forward(Tensor[] xs, Tensor(a!)[] ys, Tensor[] scales, int[] quant_min, int[] quant_max, "
      "int[] axes) -> ()");
  m.def(
      "lsq_again(Tensor x, Tensor(a) y, Tensor scale, int quant_min, int quant_max, float grad_scale, "
      "int? axis=None) -> Tensor(a)");

  // DoReFa. The second result of the forward is max|x|, for the backward (mean|x| with 1 bit).
  m.def("dorefa_weight(Tensor x, int bits) -> Tensor");
  m.def("dorefa_weight_forward(Tensor x, int bits) -> (Tensor, Tensor)");
  m.def("dorefa_weight_backward(Tensor grad, Tensor x, Tensor largest) -> Tensor");
  m.def("dorefa_activation(Tensor x, int bits) -> Tensor");
  m.def("dorefa_activation_forward(Tensor x, int bits, bool with_mask) -> (Tensor, Tensor)");
  // Quantizes a gradient stochastically; seed is a 1-element int64 tensor on its device.
  m.def("dorefa_gradient(Tensor grad, int bits, Tensor seed) -> Tensor");

  // Binary networks. A sign is one bit, 1 for x >= 0. Packed: int32 words, element i is bit i % 32 of word i / 32,
  // padding bits 0; images are packed along their channels, [N, H, W, words].
  m.def("binarize(Tensor x, bool clip_gradient=True) -> Tensor");
  m.def("binarize_forward(Tensor x, bool with_mask) -> (Tensor, Tensor)");
  m.def("pack_signs(Tensor x, int axis=-1) -> Tensor");
  // With the number of ones in every row.
  m.def("pack_signs_counted(Tensor x, int axis=-1) -> (Tensor, Tensor)");
  m.def("unpack_signs(Tensor packed, int k, ScalarType dtype) -> Tensor");
  // The rows of packed weights in the order in which this device's kernels read them. Derived, optional, never saved.
  m.def("arrange_signs(Tensor packed) -> Tensor");
  // Exact dot products, times scale, plus bias (both one value an output channel).
  m.def(
      "binary_matmul(Tensor a, Tensor b, int k, Tensor? scale=None, Tensor? bias=None, Tensor? arranged=None) -> "
      "Tensor");
  // The same into memory that is there; CPU.
  m.def(
      "binary_matmul_into(Tensor a, Tensor b, int k, Tensor? scale, Tensor? bias, Tensor? arranged, Tensor(a!) out) -> "
      "()");
  m.def(
      "binary_conv2d(Tensor x, Tensor weight, int channels, int[2] stride, int[2] padding, int[2] dilation, "
      "Tensor? scale=None, Tensor? bias=None, Tensor? arranged=None, bool channels_last=False) -> Tensor");
  // Their packed signs: bit n is (dot >= threshold[n]) xor bit n of flip.
  m.def(
      "binary_matmul_sign(Tensor a, Tensor b, int k, Tensor threshold, Tensor flip, Tensor? arranged=None) -> Tensor");
  m.def(
      "binary_conv2d_sign(Tensor x, Tensor weight, int channels, int[2] stride, int[2] padding, int[2] dilation, "
      "Tensor threshold, Tensor flip, Tensor? arranged=None) -> Tensor");
  // OR over the window, AND where flip has a 1.
  m.def("packed_max_pool2d(Tensor x, Tensor flip, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor");
  // Training: linear and conv2d of the signs, with the gradients of linear and conv2d; packed signs are saved.
  m.def("sign_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("sign_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");

  // Observers, on the CPU; elsewhere they are a few operations of torch. A batch is taken into a range, whose
  // moving average is followed where there is an ema_decay, or into a range and bins.
  m.def(
      "observe_range(Tensor x, int? axis, float? ema_decay, Tensor(a!) low, Tensor(b!) high, Tensor(c!) batches, "
      "Tensor(d!) spoiled) -> ()");
  m.def(
      "observe_histogram(Tensor x, int? axis, Tensor(a!) low, Tensor(b!) high, Tensor(c!) counts, Tensor(d!) exponent, "
      "Tensor(e!) origin, Tensor(f!) batches, Tensor(g!) spoiled) -> ()");
  // The range of smallest squared error, float64, one a row of the histogram.
  m.def(
      "histogram_range(Tensor counts, Tensor edges, Tensor low, Tensor high, int quant_min, int quant_max, "
      "bool symmetric) -> (Tensor, Tensor)");
}
