// to_codes and from_codes on the CPU: one pass each. The loops are in codes_loops_body.h.
#include <torch/library.h>

#include <atomic>

#include "../common/check_codes.h"
#include "channel_params.h"
#include "codes_loops.h"
#include "parallel.h"

namespace quantkern::cpu {
namespace {

// [scale of every channel, zero point of every channel, 0]
at::Tensor new_parameters(const at::Tensor& scale, const std::optional<at::Tensor>& zero_point) {
  const int64_t channels = scale.numel();
  at::Tensor parameters = at::detail::empty_cpu({2 * channels + 1}, at::kFloat);
  float* values = parameters.mutable_data_ptr<float>();
  const at::Tensor scales = scale.contiguous();
  std::copy_n(scales.const_data_ptr<float>(), channels, values);
  std::fill_n(values + channels, channels + 1, 0.0f);
  if (zero_point.has_value()) {
    const at::Tensor zero_points = zero_point->contiguous();
    std::copy_n(zero_points.const_data_ptr<int32_t>(), channels, values + channels);
  }
  return parameters;
}

// With the reciprocals where they are wanted.
void set_params(PreparedParams& params, const at::Tensor& parameters, int64_t channels, bool encodes) {
  const float* values = parameters.const_data_ptr<float>();
  const int64_t count = parameters.numel() / 2;
  const bool spoiled = values[2 * count] != 0.0f;
  for (int64_t c = 0; c < channels; ++c) {
    const float scale = spoiled ? __builtin_nanf("") : values[c];
    params.set(c, encodes ? reciprocal_scale(scale) : 0.0f, scale, values[count + c]);
  }
  params.finish();
}

TensorPair to_codes_cpu(const at::Tensor& x, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                        int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  axis = check_to_codes(x, scale, zero_point, quant_min, quant_max, axis);
  const at::Tensor dense = as_dense(x);
  at::Tensor codes = at::detail::empty_strided_cpu(dense.sizes(), dense.strides(), at::kByte);
  at::Tensor parameters = new_parameters(scale, zero_point);
  const Layout layout = layout_of(dense, axis);
  PreparedParams params(layout, quant_min, quant_max);
  set_params(params, parameters, layout.channels, true);
  const float* in = dense.const_data_ptr<float>();
  uint8_t* out = codes.mutable_data_ptr<uint8_t>();
  std::atomic<bool> exact{true};
  for_stretches(dense.numel(), [&](int64_t begin, int64_t end) {
    if (!codes_loops().encode(in, out, begin, end, params.view())) exact = false;
  });
  if (!exact) codes = at::detail::empty_cpu({0}, at::kByte);
  return {codes, parameters};
}

at::Tensor from_codes_cpu(const at::Tensor& codes, const at::Tensor& parameters, int64_t quant_min,
                          std::optional<int64_t> axis) {
  axis = check_from_codes(codes, parameters, axis);
  at::Tensor x = at::detail::empty_strided_cpu(codes.sizes(), codes.strides(), at::kFloat);
  const Layout layout = layout_of(codes, axis);
  PreparedParams params(layout, quant_min, quant_min + 1);
  set_params(params, parameters, layout.channels, false);
  const uint8_t* in = codes.const_data_ptr<uint8_t>();
  float* out = x.mutable_data_ptr<float>();
  const bool streamed = x.nbytes() >= kStreamBytes;
  for_stretches(codes.numel(), [&](int64_t begin, int64_t end) {
    codes_loops().decode(in, out, begin, end, params.view(), streamed);
  });
  return x;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("to_codes", quantkern::cpu::to_codes_cpu);
  m.impl("from_codes", quantkern::cpu::from_codes_cpu);
}
