// fake_quantize on the CPU: checks, layout, threads. The loops are in fake_quantize_loops_body.h.
#include "fake_quantize.h"

#include <torch/library.h>

#include <cstring>

#include "../common/check_args.h"
#include "parallel.h"

namespace quantkern::cpu {

bool is_delayed(const std::optional<at::Tensor>& step, int64_t start_step) {
  return step.has_value() && *step->const_data_ptr<int64_t>() < start_step;
}

float zero_point_at(const at::Tensor& zero_point, int64_t channel) {
  return zero_point.scalar_type() == at::kInt ? static_cast<float>(zero_point.const_data_ptr<int32_t>()[channel])
                                              : zero_point.const_data_ptr<float>()[channel];
}

void run_fake_quantize(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask,
                       const ChannelParams& params) {
  uint8_t* bits = mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const auto loop = fake_quantize_loops().quantize;
  const DType dtype = dtype_of(in), out_dtype = dtype_of(out);
  const void* x = in.const_data_ptr();
  void* y = out.mutable_data_ptr();
  const bool streamed = is_streamed(in, out);
  for_stretches(in.numel(),
                [&](int64_t begin, int64_t end) { loop(dtype, out_dtype, x, y, bits, begin, end, params, streamed); });
}

void run_identity(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask) {
  if (!in.is_same(out)) out.copy_(in);
  if (!mask.numel()) return;
  uint8_t* bits = mask.mutable_data_ptr<uint8_t>();
  std::memset(bits, 0xff, mask.numel());
  if (in.numel() % 8) bits[mask.numel() - 1] = static_cast<uint8_t>((1u << in.numel() % 8) - 1u);
}

namespace {

TensorPair fake_quantize_number_cpu(const at::Tensor& x, double scale, double zero_point, int64_t quant_min,
                                    int64_t quant_max, bool with_mask) {
  check_input(x);
  check_quant_range(quant_min, quant_max);
  const float inverse = check_scale_value(scale);
  check_zero_point_value(zero_point, quant_min, quant_max);
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  PreparedParams params({1, 1, x.numel()}, quant_min, quant_max);
  params.set(0, inverse, static_cast<float>(scale), static_cast<float>(zero_point));
  params.finish();
  run_fake_quantize(in, out, mask, params.view());
  return {out, mask};
}

TensorPair fake_quantize_cpu(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                             int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                             const std::optional<at::Tensor>& step, int64_t start_step, bool with_mask,
                             std::optional<at::ScalarType> dtype) {
  check_input(x);
  check_quant_range(quant_min, quant_max);
  axis = check_axis(x, axis);
  check_dtype(scale, at::kFloat, "scale");
  check_zero_point_dtype(zero_point);
  check_parameter(scale, x, axis, "scale");
  check_parameter(zero_point, x, axis, "zero_point");
  check_step(step, x);
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  at::Tensor mask = new_mask(x, with_mask);
  if (is_delayed(step, start_step)) {
    run_identity(in, out, mask);
    return {out, mask};
  }
  const at::Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  const float* s = scales.const_data_ptr<float>();
  const Layout layout = layout_of(out, axis);
  PreparedParams params(layout, quant_min, quant_max);
  const bool integers = zero_points.scalar_type() == at::kInt;
  for (int64_t c = 0; c < scales.numel(); ++c) {
    const float zero = zero_point_at(zero_points, c);
    const float inverse = check_scale_value(s[c]);
    if (integers) check_zero_point_value(zero, quant_min, quant_max);
    if (c < layout.channels) params.set(c, inverse, s[c], zero);
  }
  params.finish();
  run_fake_quantize(in, out, mask, params.view());
  return {out, mask};
}

at::Tensor fake_quantize_backward_cpu(const at::Tensor& grad, const at::Tensor& mask, at::IntArrayRef strides) {
  check_input(grad);
  check_mask(grad, mask);
  auto [in, out] = dense_in_out(grad, strides);
  const auto loop = fake_quantize_loops().select;
  const void* g = in.const_data_ptr();
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  void* dx = out.mutable_data_ptr();
  const bool streamed = is_streamed(in, out);
  for_stretches(grad.numel(),
                [&](int64_t begin, int64_t end) { loop(grad.element_size(), g, bits, dx, begin, end, streamed); });
  return out;
}

void fake_quantize_backward_in_place_cpu(at::Tensor& grad, const at::Tensor& mask) {
  check_input(grad);
  check_dense(grad, "grad");
  check_mask(grad, mask);
  const auto loop = fake_quantize_loops().select_in_place;
  const uint8_t* bits = mask.const_data_ptr<uint8_t>();
  void* dx = grad.mutable_data_ptr();
  for_stretches(grad.numel(), [&](int64_t begin, int64_t end) { loop(grad.element_size(), dx, bits, begin, end); });
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("fake_quantize_forward", quantkern::cpu::fake_quantize_cpu);
  m.impl("fake_quantize_forward.number", quantkern::cpu::fake_quantize_number_cpu);
  m.impl("fake_quantize_backward", quantkern::cpu::fake_quantize_backward_cpu);
  m.impl("fake_quantize_backward_", quantkern::cpu::fake_quantize_backward_in_place_cpu);
}
