// The sign of x as a number.
//
//   y = 1 where x >= 0, else -1 (so for NaN);  mask bit = 1 where |x| <= 1
//
// Layout: x, y and the mask in the order x's elements lie in memory. Bit i % 8 of byte i / 8 is element i.
// Grid: one thread owns eight consecutive elements and their mask byte, then strides by the whole grid.
// Bytes an element: reads x and writes y and 1/8 byte of mask, 8.125 in float32 and 4.125 in 16 bits.
// Numerics: comparisons alone (numerics/binary.h); the results are exact in every element type.
#include "binarize.cuh"

#include <type_traits>

#include "../numerics/binary.h"
#include "vector_io.cuh"

namespace quantkern::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock)
    binarize_kernel(const T* x, T* y, uint8_t* mask, int64_t numel, bool x_vectorizable) {
  map_groups(x, y, numel, x_vectorizable, [&](Group<T>& group, int64_t begin) {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float value = to_float(group.lane[j]);
      bits |= (value >= -1.0f && value <= 1.0f ? 1u : 0u) << j;
      group.lane[j] = from_float<T>(is_plus(value) ? 1.0f : -1.0f);
    }
    if (mask != nullptr) mask[begin / kGroup] = static_cast<uint8_t>(bits & element_bits(begin, numel));
  });
}

}  // namespace

cudaError_t launch_binarize(const BinarizeArguments& a, cudaStream_t stream) {
  if (a.numel == 0) return cudaSuccess;
  return for_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_over_groups(binarize_kernel<T>, a.numel, stream, static_cast<const T*>(a.x), static_cast<T*>(a.y),
                              a.mask, a.numel, is_vectorizable(a.x, 1, a.numel));
  });
}

}  // namespace quantkern::cuda
