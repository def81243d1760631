// DoReFa's activation transform.
//
//   y = rint(clip(x, 0, 1) * n) / n, n = 2^bits - 1;  mask bit = 1 where 0 <= x <= 1
//
// Layout: x, y and the mask in the order x's elements lie in memory. Bit i % 8 of byte i / 8 is element i.
// Grid: one thread owns eight consecutive elements and their mask byte, then strides by the whole grid.
// Bytes an element: reads x and writes y and 1/8 byte of mask, 8.125 in float32 and 4.125 in 16 bits.
// Numerics: float32 for every element type, IEEE division, no contraction (numerics/dorefa_lane.h).
#include "dorefa_activation.cuh"

#include <type_traits>

#include "../numerics/dorefa.h"
#include "vector_io.cuh"

namespace quantkern::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlock)
    dorefa_activation_kernel(const T* x, T* y, uint8_t* mask, int64_t numel, float steps, bool x_vectorizable) {
  map_groups(x, y, numel, x_vectorizable, [&](Group<T>& group, int64_t begin) {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float value = to_float(group.lane[j]);
      bits |= (value >= 0.0f && value <= 1.0f ? 1u : 0u) << j;
      group.lane[j] = from_float<T>(dorefa_activation_lane(value, 0.0f, 1.0f, steps));
    }
    if (mask != nullptr) mask[begin / kGroup] = static_cast<uint8_t>(bits & element_bits(begin, numel));
  });
}

}  // namespace

cudaError_t launch_dorefa_activation(const DorefaActivationArguments& a, cudaStream_t stream) {
  if (a.numel == 0) return cudaSuccess;
  return for_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_over_groups(dorefa_activation_kernel<T>, a.numel, stream, static_cast<const T*>(a.x),
                              static_cast<T*>(a.y), a.mask, a.numel, a.steps, is_vectorizable(a.x, 1, a.numel));
  });
}

}  // namespace quantkern::cuda
