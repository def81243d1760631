// Convolutions of packed images on the CPU, as products of gathered rows. The kernels are in binary_product_*.h.
//
//   layout    a left row is an output pixel: the words of its taps one behind the other, gathered for the 64 pixels of
//             an item; nothing is expanded to floats
//   numerics  a tap outside the image is gathered as zero bits, which are -1 each; their sums with the weights are
//             added again, so that padding contributes exactly 0
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_product_run.h"

namespace quantkern::cpu {
namespace {

// Images as the left rows of a product, and for every weight row and tap the sum of its signs.
struct Pixels {
  Window window;
  const uint8_t* images;
  int64_t channels, outputs;
  std::vector<int32_t> tap_sums;  // [taps][outputs]
};

struct Pixel {
  int64_t image, y, x;  // of the upper left tap, in the image
};
Pixel pixel_at(const Window& w, int64_t row) {
  const int64_t x = row % w.out_width, y = row / w.out_width % w.out_height;
  return {row / (w.out_width * w.out_height), y * w.stride_y - w.pad_y, x * w.stride_x - w.pad_x};
}
bool is_inside(const Window& w, int64_t y, int64_t x) { return 0 <= y && y < w.height && 0 <= x && x < w.width; }

void gather_pixels(const void* source, int64_t first, int64_t count, uint8_t* out) {
  const Pixels& pixels = *static_cast<const Pixels*>(source);
  const Window& w = pixels.window;
  const int64_t bytes = 4 * w.words;
  for (int64_t row = first; row < first + count; ++row) {
    const Pixel at = pixel_at(w, row);
    for (int64_t i = 0; i < w.taps_y; ++i) {
      for (int64_t j = 0; j < w.taps_x; ++j, out += bytes) {
        const int64_t y = at.y + i * w.step_y, x = at.x + j * w.step_x;
        if (is_inside(w, y, x))
          std::memcpy(out, pixels.images + ((at.image * w.height + y) * w.width + x) * bytes, bytes);
        else
          std::memset(out, 0, bytes);
      }
    }
  }
}

void add_padding_back(const void* source, int64_t first, int64_t count, int64_t column, int64_t columns, int32_t* dots,
                      int64_t stride) {
  const Pixels& pixels = *static_cast<const Pixels*>(source);
  const Window& w = pixels.window;
  for (int64_t r = 0; r < count; ++r) {
    const Pixel at = pixel_at(w, first + r);
    if (is_inside(w, at.y, at.x) && is_inside(w, at.y + (w.taps_y - 1) * w.step_y, at.x + (w.taps_x - 1) * w.step_x))
      continue;
    int32_t* sums = dots + r * stride;
    for (int64_t tap = 0; tap < w.taps_y * w.taps_x; ++tap) {
      if (is_inside(w, at.y + tap / w.taps_x * w.step_y, at.x + tap % w.taps_x * w.step_x)) continue;
      const int32_t* own = pixels.tap_sums.data() + tap * pixels.outputs + column;
      for (int64_t c = 0; c < columns; ++c) sums[c] += own[c];
    }
  }
}

std::vector<int32_t> sums_of_taps(const at::Tensor& weight, int64_t channels) {
  const int64_t outputs = weight.size(0), taps = weight.size(1) * weight.size(2), words = weight.size(3);
  std::vector<int32_t> sums(taps * outputs);
  const auto* packed = reinterpret_cast<const uint32_t*>(weight.const_data_ptr<int32_t>());
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      int64_t ones = 0;
      for (int64_t k = 0; k < words; ++k) ones += __builtin_popcount(packed[(o * taps + tap) * words + k]);
      sums[tap * outputs + o] = static_cast<int32_t>(2 * ones - channels);
    }
  }
  return sums;
}

struct Geometry {
  at::IntArrayRef stride, padding, dilation;
};

Window check_operands(const at::Tensor& x, const at::Tensor& weight, int64_t channels, const Geometry& g,
                      const std::optional<at::Tensor>& arranged) {
  const Window w = check_conv(x, weight, channels, g.stride, g.padding, g.dilation);
  check_padding_bits(x, channels, "x");
  check_padding_bits(weight, channels, "weight");
  check_arranged(arranged, x, arranged_bytes(weight.size(0), w.taps_y * w.taps_x * w.words * 4));
  return w;
}

void convolve(BinaryProduct p, const Window& w, const at::Tensor& x, const at::Tensor& weight, int64_t channels,
              const std::optional<at::Tensor>& arranged) {
  p.m = w.images * w.out_height * w.out_width;
  p.length = w.taps_y * w.taps_x * channels;
  Pixels pixels{w, bytes_of(x), channels, p.n, {}};
  if (w.pad_y || w.pad_x) {
    pixels.tap_sums = sums_of_taps(weight, channels);
    p.correct = add_padding_back;
  }
  p.source = &pixels;
  p.rows = gather_pixels;
  run_product(p, weight, arranged);
}

at::Tensor binary_conv2d_cpu(const at::Tensor& x, const at::Tensor& weight, int64_t channels, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, const std::optional<at::Tensor>& scale,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& arranged,
                             bool channels_last) {
  const Window w = check_operands(x, weight, channels, {stride, padding, dilation}, arranged);
  BinaryProduct p = product_with(weight);
  check_vector(scale, x, p.n, at::kFloat, "scale");
  check_vector(bias, x, p.n, at::kFloat, "bias");
  const at::Tensor values = at::empty({w.images, p.n, w.out_height, w.out_width}, x.options().dtype(at::kFloat),
                                      channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  set_values(p, scale, bias, values);
  p.plane = channels_last ? 0 : w.out_height * w.out_width;
  convolve(p, w, x, weight, channels, arranged);
  return values;
}

at::Tensor binary_conv2d_sign_cpu(const at::Tensor& x, const at::Tensor& weight, int64_t channels,
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                  const at::Tensor& threshold, const at::Tensor& flip,
                                  const std::optional<at::Tensor>& arranged) {
  const Window w = check_operands(x, weight, channels, {stride, padding, dilation}, arranged);
  BinaryProduct p = product_with(weight);
  check_thresholds(threshold, flip, x, p.n);
  const at::Tensor signs = at::empty({w.images, w.out_height, w.out_width, words_of(p.n)}, x.options());
  set_signs(p, threshold, flip, signs);
  convolve(p, w, x, weight, channels, arranged);
  return signs;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("binary_conv2d", quantkern::cpu::binary_conv2d_cpu);
  m.impl("binary_conv2d_sign", quantkern::cpu::binary_conv2d_sign_cpu);
}
