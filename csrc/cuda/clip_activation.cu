// ReLU, ReLU6 and Hardtanh with one saved bit an element.
//
//   y = x within [lower, upper];  mask bit = 1 where lower < x < upper
//
// Layout: x, y and the mask in the order x's elements lie in memory. Bit i % 8 of byte i / 8 is element i.
// Grid: one thread owns eight consecutive elements and their mask byte, then strides by the whole grid.
// Bytes an element: reads x and writes y and 1/8 byte of mask, 8.125 in float32 and 4.125 in 16 bits.
// Numerics: comparisons alone (numerics/affine_lane.h); NaN stays NaN with gradient 0.
#include "clip_activation.cuh"

#include <type_traits>

#include "quantize_group.cuh"

namespace quantkern::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock) clip_activation_kernel(const T* x, T* y, uint8_t* mask, int64_t numel,
                                                                 float lower, float upper, bool x_vectorizable) {
  map_groups(x, y, numel, x_vectorizable, [&](Group<T>& group, int64_t begin) {
    const unsigned bits = clip_in_place(group, lower, upper);
    if (mask != nullptr) mask[begin / kGroup] = static_cast<uint8_t>(bits & element_bits(begin, numel));
  });
}

}  // namespace

cudaError_t launch_clip_activation(const ClipArguments& a, cudaStream_t stream) {
  if (a.numel == 0) return cudaSuccess;
  return for_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_over_groups(clip_activation_kernel<T>, a.numel, stream, static_cast<const T*>(a.x),
                              static_cast<T*>(a.y), a.mask, a.numel, a.lower, a.upper,
                              is_vectorizable(a.x, 1, a.numel));
  });
}

}  // namespace quantkern::cuda
