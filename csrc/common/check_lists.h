// The arguments of operations on all weights at once: lists that are as long as each other, on one device.
#pragma once

#include <ATen/core/List.h>

#include "check_args.h"
#include "layout.h"

namespace quantkern {

using TensorListOfMaybe = c10::List<std::optional<at::Tensor>>;

inline void check_length(size_t length, at::TensorList xs, const char* name) {
  TORCH_CHECK_VALUE(length == xs.size(), name, " must have one entry for each of the ", xs.size(),
                    " tensors in xs, got ", length);
}

inline void check_one_device(at::TensorList xs) {
  for (const at::Tensor& x : xs)
    TORCH_CHECK_VALUE(x.device() == xs[0].device(), "xs must lie on one device, got ", xs[0].device(), " and ",
                      x.device(), "; call the operation once a device");
}

// In a list -1 stands for a whole tensor; the other axes are counted from the front.
inline std::optional<int64_t> axis_of(const at::Tensor& x, int64_t axis) {
  TORCH_CHECK_INDEX(-1 <= axis && axis < x.dim(), "axes must lie in [-1, ", x.dim() - 1, "] for a ", x.dim(),
                    "-dimensional x, -1 for the whole tensor, got ", axis);
  return axis < 0 ? std::nullopt : std::optional<int64_t>(axis);
}

// What a result may be: of its x's type, or of a 16-bit type where x is float32.
inline bool is_result_dtype(at::ScalarType x, at::ScalarType y) {
  return x == y || (x == at::kFloat && (y == at::kHalf || y == at::kBFloat16));
}

// x as the kernels read it and the given tensor that they write. A sparse view of memory is copied there first, if
// nothing is lost by that.
inline DenseInOut dense_into(const at::Tensor& x, const at::Tensor& y) {
  check_dense(y, "every one of ys");
  TORCH_CHECK_VALUE(
      y.sizes() == x.sizes() && is_result_dtype(x.scalar_type(), y.scalar_type()) && y.device() == x.device(),
      "every one of ys must be like its x, or of a 16-bit type for float32, got ", y.sizes(), " ", y.scalar_type(),
      " for ", x.sizes(), " ", x.scalar_type());
  if (x.scalar_type() != y.scalar_type()) return {in_layout_of(x, y), y};
  if (x.strides() == y.strides()) return {x, y};
  y.copy_(x);
  return {y, y};
}

// An empty mask is not wanted.
inline void check_maybe_mask(const at::Tensor& mask, const at::Tensor& x) {
  if (mask.numel() > 0) check_mask(x, mask);
}

// Everything of fake_quantize_weights_forward but what dense_into checks.
inline void check_weight_lists(at::TensorList xs, at::TensorList ys, at::TensorList masks, at::TensorList scales,
                               at::TensorList zero_points, at::IntArrayRef quant_min, at::IntArrayRef quant_max,
                               const c10::List<bool>& symmetric, at::IntArrayRef axes, const TensorListOfMaybe& steps,
                               at::IntArrayRef start_steps) {
  check_length(ys.size(), xs, "ys");
  check_length(masks.size(), xs, "masks");
  check_length(scales.size(), xs, "scales");
  check_length(zero_points.size(), xs, "zero_points");
  check_length(quant_min.size(), xs, "quant_min");
  check_length(quant_max.size(), xs, "quant_max");
  check_length(symmetric.size(), xs, "symmetric");
  check_length(axes.size(), xs, "axes");
  check_length(steps.size(), xs, "steps");
  check_length(start_steps.size(), xs, "start_steps");
  check_one_device(xs);
  for (size_t i = 0; i < xs.size(); ++i) {
    check_input(xs[i]);
    check_quant_range(quant_min[i], quant_max[i]);
    const std::optional<int64_t> axis = axis_of(xs[i], axes[i]);
    check_state(scales[i], xs[i], axis, at::kFloat, "scale");
    check_state(zero_points[i], xs[i], axis, at::kInt, "zero_point");
    check_step(steps.get(i), xs[i]);
    check_maybe_mask(masks[i], xs[i]);
  }
}

// The same for lsq_weights_forward.
inline void check_lsq_lists(at::TensorList xs, at::TensorList ys, at::TensorList scales, at::IntArrayRef quant_min,
                            at::IntArrayRef quant_max, at::IntArrayRef axes) {
  check_length(ys.size(), xs, "ys");
  check_length(scales.size(), xs, "scales");
  check_length(quant_min.size(), xs, "quant_min");
  check_length(quant_max.size(), xs, "quant_max");
  check_length(axes.size(), xs, "axes");
  check_one_device(xs);
  for (size_t i = 0; i < xs.size(); ++i)
    (void)check_lsq(xs[i], scales[i], quant_min[i], quant_max[i], axis_of(xs[i], axes[i]), std::nullopt);
}

}  // namespace quantkern
