// The checks of packed signs that every device shares, with their messages.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "../numerics/binary.h"
#include "../numerics/window.h"
#include "dtype.h"

namespace quantkern {

inline void check_same_device(const at::Tensor& value, const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(value.device() == x.device(), name, " is on ", value.device(), ", x on ", x.device(),
                    "; move it with ", name, ".to(x.device)");
}

// int32, contiguous, and as many words a row as k signs take.
inline void check_packed(const at::Tensor& packed, int64_t k, const char* name) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kInt, name, " must hold packed signs, int32 from pack_signs, got ",
                   packed.scalar_type());
  TORCH_CHECK_VALUE(0 <= k && k <= kLongestSum, "k must lie in [0, ", kLongestSum, "], got ", k);
  TORCH_CHECK_VALUE(packed.dim() > 0 && packed.size(-1) == words_of(k), name, " must have rows of ", words_of(k),
                    " words for k=", k, " signs, 32 a word, got shape ", packed.sizes());
  TORCH_CHECK_VALUE(packed.is_contiguous(), name, " must be contiguous, got strides ", packed.strides(), "; call ",
                    name, ".contiguous()");
}

inline void check_packed(const at::Tensor& packed, int64_t k, const char* name, int64_t dims) {
  TORCH_CHECK_VALUE(packed.dim() == dims, name, " must have ", dims, " dimensions, the packed one last, got shape ",
                    packed.sizes());
  check_packed(packed, k, name);
}

inline void check_vector(const at::Tensor& value, const at::Tensor& x, int64_t count, at::ScalarType dtype,
                         const char* name) {
  TORCH_CHECK_TYPE(value.scalar_type() == dtype, name, " must be ", dtype, ", got ", value.scalar_type());
  TORCH_CHECK_VALUE(value.dim() == 1 && value.numel() == count && value.is_contiguous(), name,
                    " must be a contiguous vector of ", count, " values, got shape ", value.sizes());
  check_same_device(value, x, name);
}
inline void check_vector(const std::optional<at::Tensor>& value, const at::Tensor& x, int64_t count,
                         at::ScalarType dtype, const char* name) {
  if (value.has_value()) check_vector(*value, x, count, dtype, name);
}

inline void check_thresholds(const at::Tensor& threshold, const at::Tensor& flip, const at::Tensor& x, int64_t count) {
  check_vector(threshold, x, count, at::kInt, "threshold");
  check_vector(flip, x, words_of(count), at::kInt, "flip");
}

inline void check_arranged(const std::optional<at::Tensor>& arranged, const at::Tensor& x, int64_t bytes) {
  if (!arranged.has_value()) return;
  TORCH_CHECK_VALUE(arranged->scalar_type() == at::kByte && arranged->dim() == 1 && arranged->numel() == bytes &&
                        arranged->is_contiguous() && arranged->device() == x.device(),
                    "arranged must be arrange_signs of these weights on this device: ", bytes, " bytes, got ",
                    arranged->scalar_type(), " of shape ", arranged->sizes(), " on ", arranged->device());
}

inline void check_matmul(const at::Tensor& a, const at::Tensor& b, int64_t k) {
  check_packed(a, k, "a", 2);
  check_packed(b, k, "b", 2);
  check_same_device(b, a, "b");
}

inline Window make_window(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                          at::IntArrayRef dilation) {
  Window w{x.size(0), x.size(1),  x.size(2),  x.size(3),   kernel[0],   kernel[1], stride[0],
           stride[1], padding[0], padding[1], dilation[0], dilation[1], 0,         0};
  TORCH_CHECK_VALUE(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && padding[0] >= 0 &&
                        padding[1] >= 0 && kernel[0] > 0 && kernel[1] > 0,
                    "kernel, stride and dilation must be positive and padding at least 0, got kernel ", kernel,
                    ", stride ", stride, ", padding ", padding, ", dilation ", dilation);
  const auto out = [](int64_t size, int64_t taps, int64_t by, int64_t pad, int64_t step) {
    const int64_t room = size + 2 * pad - step * (taps - 1) - 1;
    return room < 0 ? 0 : room / by + 1;
  };
  w.out_height = out(w.height, w.taps_y, w.stride_y, w.pad_y, w.step_y);
  w.out_width = out(w.width, w.taps_x, w.stride_x, w.pad_x, w.step_x);
  TORCH_CHECK_VALUE(w.out_height > 0 && w.out_width > 0, "the kernel ", kernel, " with dilation ", dilation,
                    " is larger than the image ", x.sizes().slice(1, 2), " with padding ", padding);
  return w;
}

inline Window check_conv(const at::Tensor& x, const at::Tensor& weight, int64_t channels, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_packed(x, channels, "x", 4);
  check_packed(weight, channels, "weight", 4);
  check_same_device(weight, x, "weight");
  TORCH_CHECK_VALUE(channels * weight.size(1) * weight.size(2) <= kLongestSum, "one sum takes ",
                    channels * weight.size(1) * weight.size(2), " signs, at most ", kLongestSum, " are exact");
  return make_window(x, weight.sizes().slice(1, 2), stride, padding, dilation);
}

inline Window check_pool(const at::Tensor& x, const at::Tensor& flip, at::IntArrayRef kernel, at::IntArrayRef stride,
                         at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be packed images [N, H, W, words], got shape ", x.sizes());
  check_packed(x, x.size(-1) * kWordBits, "x", 4);
  check_vector(flip, x, x.size(-1), at::kInt, "flip");
  TORCH_CHECK_VALUE(2 * padding[0] <= kernel[0] && 2 * padding[1] <= kernel[1],
                    "padding must be at most half of kernel_size, got kernel_size ", kernel, ", padding ", padding);
  return make_window(x, kernel, stride, padding, {1, 1});
}

}  // namespace quantkern
