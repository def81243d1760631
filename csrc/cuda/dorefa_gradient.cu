// DoReFa's stochastic quantization of gradients.
//
//   out = 2 M (q(g / (2 M) + 1/2 + noise / n) - 1/2), M = max|g| of the sample, n = 2^bits - 1, noise in [-1/2, 1/2)
//   0 where M is 0; g where M or 2 M is not finite
//
// Layout: g and out in the order g lies in memory, [outer, samples, inner]. The noise of element i is word i % 4 of
// block i / 4 of the seed's stream (numerics/philox.h), so that it does not depend on who computes it.
// Grid: ranges.cu, there also one warp a sample for its M, then one thread owns eight consecutive elements, which is
// two blocks of the stream, and strides by the whole grid.
// Bytes an element: reads g twice and writes out, 12 in float32 and 6 in 16 bits.
// Numerics: float32 for every element type, IEEE division, no contraction (numerics/dorefa_lane.h).
#include "dorefa_gradient.cuh"

#include <type_traits>

#include "../numerics/dorefa.h"
#include "../numerics/philox.h"
#include "ranges.cuh"

namespace quantkern::cuda {
namespace {

constexpr int kPhiloxWords = 4;

__device__ __forceinline__ float quantize_gradient(float grad, float width, float steps, uint32_t word) {
  if (!is_finite(width)) return grad;
  return width > 0.0f ? dorefa_gradient_lane(grad, width, steps, centered_uniform(word), 0.0f) : 0.0f;
}

// kWholeGroups: every group lies inside one sample. Else the sample is followed element by element.
template <class T, bool kWholeGroups>
__global__ void __launch_bounds__(kBlock)
    dorefa_gradient_kernel(const T* grad, T* out, ChannelView view, const float* largest, float steps,
                           const int64_t* seed, bool vectorizable) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  map_groups(grad, out, view.numel(), vectorizable, [&](Group<T>& group, int64_t begin) {
    const uint64_t block = static_cast<uint64_t>(begin / kPhiloxWords);
    const PhiloxBlock words[kGroup / kPhiloxWords] = {philox(key, block), philox(key, block + 1)};
    const int64_t row = begin / view.inner;
    int64_t column = begin - row * view.inner, sample = row % view.channels;
    float width = 2.0f * largest[sample];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const uint32_t word = words[j / kPhiloxWords].word[j % kPhiloxWords];
      group.lane[j] = from_float<T>(quantize_gradient(to_float(group.lane[j]), width, steps, word));
      if (!kWholeGroups && ++column == view.inner) {
        column = 0;
        sample = sample + 1 == view.channels ? 0 : sample + 1;
        width = 2.0f * largest[sample];
      }
    }
  });
}

template <class T>
cudaError_t launch_quantization(const DorefaGradientArguments& a, const float* largest, cudaStream_t stream) {
  const int64_t numel = a.view.numel();
  const bool whole = a.view.channels == 1 || a.view.inner % kGroup == 0;
  return launch_over_groups(whole ? dorefa_gradient_kernel<T, true> : dorefa_gradient_kernel<T, false>, numel, stream,
                            static_cast<const T*>(a.grad), static_cast<T*>(a.out), a.view, largest, a.steps, a.seed,
                            is_vectorizable(a.grad, 1, numel));
}

}  // namespace

cudaError_t dorefa_gradient_workspace_bytes(const DorefaGradientArguments& a, int64_t& bytes) {
  RangePlan plan;
  const cudaError_t error = plan_ranges(a.view, plan);
  bytes = plan.partials() * static_cast<int64_t>(sizeof(Range)) + a.view.channels * static_cast<int64_t>(sizeof(float));
  return error;
}

cudaError_t launch_dorefa_gradient(const DorefaGradientArguments& a, void* workspace, cudaStream_t stream) {
  if (a.view.numel() == 0) return cudaSuccess;
  RangePlan plan;
  cudaError_t error = plan_ranges(a.view, plan);
  if (error != cudaSuccess) return error;
  Range* partials = static_cast<Range*>(workspace);
  float* largest = reinterpret_cast<float*>(partials + plan.partials());
  error = launch_ranges(a.dtype, a.grad, plan, partials, nullptr, nullptr, stream);
  if (error != cudaSuccess) return error;
  error = launch_largest(plan, partials, largest, stream);
  if (error != cudaSuccess) return error;
  return for_dtype(a.dtype, [&](auto* type) {
    return launch_quantization<std::remove_pointer_t<decltype(type)>>(a, largest, stream);
  });
}

}  // namespace quantkern::cuda
