// Max pooling of packed signs.
//
//   y = flip ^ OR over the window of (x ^ flip): OR, and AND where flip has a 1
//
// Layout: x [images, height, width, words], y [images, out_height, out_width, words]; padding takes no part.
// Grid: one thread owns a word of y, neighbours neighbouring words, and strides by the whole grid.
// Bytes an element: reads 1/8 byte for each window an element lies in and writes 1/8.
// Numerics: bits.
#include "packed_max_pool2d.cuh"

namespace quantkern::cuda {
namespace {

__device__ __forceinline__ int64_t at_least_zero(int64_t v) { return v < 0 ? 0 : v; }
__device__ __forceinline__ int64_t at_most(int64_t v, int64_t limit) { return v < limit ? v : limit; }

__global__ void __launch_bounds__(kBlock)
    packed_max_pool2d_kernel(const uint32_t* x, const uint32_t* flip, uint32_t* y, Window w) {
  const int64_t all = w.images * w.out_height * w.out_width * w.words;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index < all; index += stride) {
    const int64_t pixel = index / w.words, word = index - pixel * w.words;
    const int64_t line = pixel / w.out_width, image = line / w.out_height;
    const int64_t top = (line - image * w.out_height) * w.stride_y - w.pad_y;
    const int64_t left = (pixel - line * w.out_width) * w.stride_x - w.pad_x;
    const int64_t bottom = at_most(top + w.taps_y, w.height), right = at_most(left + w.taps_x, w.width);
    const uint32_t turned = flip[word];
    uint32_t bits = 0;
    for (int64_t row = at_least_zero(top); row < bottom; ++row) {
      const uint32_t* source = x + (image * w.height + row) * w.width * w.words + word;
      for (int64_t column = at_least_zero(left); column < right; ++column) bits |= source[column * w.words] ^ turned;
    }
    y[index] = bits ^ turned;
  }
}

}  // namespace

cudaError_t launch_packed_max_pool2d(const uint32_t* x, const uint32_t* flip, uint32_t* y, const Window& w,
                                     cudaStream_t stream) {
  const int64_t all = w.images * w.out_height * w.out_width * w.words;
  if (all == 0) return cudaSuccess;
  return launch_over_groups(packed_max_pool2d_kernel, all * kGroup, stream, x, flip, y, w);
}

}  // namespace quantkern::cuda
