// packed_max_pool2d on the CPU: OR over the window, AND where a channel is flipped.
//
//   formula   ((OR of (x xor flip)) xor flip); padding takes no part
//   layout    packed images, 32 channels a word; a thread owns whole output pixels
//   bytes     every word of a window is read once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/check_packed.h"
#include "parallel.h"

namespace quantkern::cpu {
namespace {

void pool_pixel(const Window& w, const uint32_t* images, const uint32_t* flip, int64_t pixel, uint32_t* out) {
  const int64_t image = pixel / (w.out_width * w.out_height);
  const int64_t y = pixel / w.out_width % w.out_height * w.stride_y - w.pad_y;
  const int64_t x = pixel % w.out_width * w.stride_x - w.pad_x;
  const int64_t top = std::max<int64_t>(0, y), bottom = std::min(w.height, y + w.taps_y);
  const int64_t left = std::max<int64_t>(0, x), right = std::min(w.width, x + w.taps_x);
  std::fill(out, out + w.words, 0u);
  for (int64_t i = top; i < bottom; ++i) {
    for (int64_t j = left; j < right; ++j) {
      const uint32_t* in = images + ((image * w.height + i) * w.width + j) * w.words;
      for (int64_t k = 0; k < w.words; ++k) out[k] |= in[k] ^ flip[k];
    }
  }
  for (int64_t k = 0; k < w.words; ++k) out[k] ^= flip[k];
}

at::Tensor packed_max_pool2d_cpu(const at::Tensor& x, const at::Tensor& flip, at::IntArrayRef kernel,
                                 at::IntArrayRef stride, at::IntArrayRef padding) {
  const Window w = check_pool(x, flip, kernel, stride, padding);
  const at::Tensor out = at::empty({w.images, w.out_height, w.out_width, w.words}, x.options());
  const auto* images = reinterpret_cast<const uint32_t*>(x.const_data_ptr<int32_t>());
  const auto* turned = reinterpret_cast<const uint32_t*>(flip.const_data_ptr<int32_t>());
  auto* words = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>());
  const int64_t pixels = w.images * w.out_height * w.out_width;
  at::parallel_for(0, pixels, 1 + kGrain / (1 + 4 * w.words * w.taps_y * w.taps_x), [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) pool_pixel(w, images, turned, pixel, words + pixel * w.words);
  });
  return out;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("packed_max_pool2d", quantkern::cpu::packed_max_pool2d_cpu); }
