// The argument checks of to_codes and from_codes.
#pragma once

#include <tuple>

#include "check_args.h"

namespace quantkern {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// Returns the axis counted from the front, or nothing.
inline std::optional<int64_t> check_to_codes(const at::Tensor& x, const at::Tensor& scale,
                                             const std::optional<at::Tensor>& zero_point, int64_t quant_min,
                                             int64_t quant_max, std::optional<int64_t> axis) {
  check_dtype(x, at::kFloat, "x");
  check_quant_range(quant_min, quant_max);
  TORCH_CHECK_VALUE(quant_max - quant_min <= 255, "a code is one byte: quant_max - quant_min must be at most 255, got ",
                    quant_max - quant_min);
  axis = check_axis(x, axis);
  check_dtype(scale, at::kFloat, "scale");
  check_parameter(scale, x, axis, "scale");
  if (!zero_point.has_value()) return axis;
  check_dtype(*zero_point, at::kInt, "zero_point");
  check_parameter(*zero_point, x, axis, "zero_point");
  return axis;
}

inline std::optional<int64_t> check_from_codes(const at::Tensor& codes, const at::Tensor& parameters,
                                               std::optional<int64_t> axis) {
  check_dtype(codes, at::kByte, "codes");
  check_dense(codes, "codes");
  axis = check_axis(codes, axis);
  check_dtype(parameters, at::kFloat, "parameters");
  const int64_t channels = axis.has_value() ? codes.size(*axis) : 1;
  TORCH_CHECK_VALUE(parameters.is_contiguous() && parameters.numel() == 2 * channels + 1, "parameters must hold ",
                    2 * channels + 1, " values, as to_codes gives them, got shape ", parameters.sizes());
  TORCH_CHECK_VALUE(parameters.device() == codes.device(), "parameters are on ", parameters.device(), ", codes on ",
                    codes.device());
  return axis;
}

}  // namespace quantkern
