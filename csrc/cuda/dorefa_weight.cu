// DoReFa's weight transform and its backward.
//
//   y = 2 * q(tanh(w) / (2 m) + 1/2) - 1, m = tanh(max|w|), q(z) = rint(z * n) / n;  one bit: sign(w) * mean|w|
//   dw = (grad / m - s) * (1 - tanh(w)^2), s = sign(w) * (sum of grad * tanh(w)) / m^2 / count where |tanh(w)| = m,
//   `count` times, and 0 elsewhere; 0 where m is 0
//
// Layout: w, y, grad and dw in the order w's elements lie in memory; partial results one a block.
// Grid: the passes that reduce give each block one stretch of consecutive groups of eight elements (RangePlan of one
// channel), a warp combines the forward's partial results; the transform gives each thread a group, then strides by
// the whole grid. Grid, second pass of the backward: a block whose stretch holds no maximum, as most do, ends at once;
// any other adds up all partial sums by itself, in the same order, and mends its stretch.
// Bytes an element: forward reads w twice and writes y, backward reads w and grad and writes dw: 12 in float32 and 6
// in 16 bits either way.
// Numerics: float32 lanes, tanh from numerics/dorefa_lane.h; sums in float32 within a group, float64 beyond, in an
// order that depends on the size and the device alone.
#include "dorefa_weight.cuh"

#include <type_traits>

#include "../numerics/dorefa.h"
#include "ranges.cuh"

namespace quantkern::cuda {
namespace {

// What one stretch leaves for the gradient that goes through the maximum.
struct DorefaPartial {
  double grad_tanh;
  int64_t at_largest;
};

// Calls f(begin) for the groups of a stretch that belong to this thread.
template <class F>
__device__ __forceinline__ void for_stretch(const RangePlan& plan, int64_t stretch, const F& f) {
  const int64_t first = stretch * plan.chunk, groups = ceil_div(plan.view.inner, kGroup);
  const int64_t end = min_lane(first + plan.chunk, groups);
  for (int64_t group = first + threadIdx.x; group < end; group += kBlock) f(group * kGroup);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    magnitude_sum_kernel(const T* w, bool vectorizable, RangePlan plan, double* partials) {
  const int64_t numel = plan.view.inner;
  for (int64_t stretch = blockIdx.x; stretch < plan.splits; stretch += gridDim.x) {
    double sum = 0.0;
    for_stretch(plan, stretch, [&](int64_t begin) {
      const Group<T> group = load_group(w, begin, numel, vectorizable);
      const unsigned elements = element_bits(begin, numel);
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) part += elements >> j & 1u ? magnitude(to_float(group.lane[j])) : 0.0f;
      sum += static_cast<double>(part);
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[stretch] = sum;
  }
}

// One warp.
__global__ void __launch_bounds__(kWarp) mean_kernel(RangePlan plan, const double* partials, float* mean) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < plan.splits; i += kWarp) sum += partials[i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) *mean = static_cast<float>(sum / static_cast<double>(plan.view.inner));
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    dorefa_weight_kernel(const T* w, T* y, int64_t numel, float steps, const float* largest, bool w_vectorizable) {
  const float width = 2.0f * max_lane(kSmallestScale, tanh_lane(*largest));
  map_groups(w, y, numel, w_vectorizable, [&](Group<T>& group, int64_t) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      group.lane[j] = from_float<T>(dorefa_weight_lane(to_float(group.lane[j]), width, steps));
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    dorefa_sign_kernel(const T* w, T* y, int64_t numel, const float* mean, bool w_vectorizable) {
  const float plus = *mean;
  map_groups(w, y, numel, w_vectorizable, [&](Group<T>& group, int64_t) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float value = to_float(group.lane[j]);
      group.lane[j] = from_float<T>(value >= 0.0f ? plus : where_less(value, 0.0f, -plus, value));
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    dorefa_weight_backward_kernel(const T* w, const T* grad, T* dw, bool vectorizable, RangePlan plan,
                                  const float* largest, DorefaPartial* partials) {
  const int64_t numel = plan.view.inner;
  const float m = tanh_lane(*largest);
  for (int64_t stretch = blockIdx.x; stretch < plan.splits; stretch += gridDim.x) {
    double sum = 0.0;
    int64_t at_largest = 0;
    for_stretch(plan, stretch, [&](int64_t begin) {
      const Group<T> weights = load_group(w, begin, numel, vectorizable);
      Group<T> group = load_group(grad, begin, numel, vectorizable);
      const unsigned elements = m > 0.0f ? element_bits(begin, numel) : 0u;
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        float t;
        const float above = to_float(group.lane[j]);
        const float gradient = dorefa_weight_gradient_lane(to_float(weights.lane[j]), above, m, t);
        const bool counts = elements >> j & 1u;
        part += counts ? above * t : 0.0f;
        at_largest += counts && magnitude(t) == m;
        group.lane[j] = from_float<T>(counts ? gradient : 0.0f);
      }
      sum += static_cast<double>(part);
      store_group(dw, begin, numel, vectorizable, group);
    });
    sum = block_sum(sum);
    at_largest = block_sum(at_largest);
    if (threadIdx.x == 0) partials[stretch] = {sum, at_largest};
  }
}

// The gradient of m, shared by the elements that attain it. Called by whole blocks; every thread gets it.
__device__ __forceinline__ float gradient_of_largest(const RangePlan& plan, const DorefaPartial* partials, float m) {
  double sum = 0.0;
  int64_t at_largest = 0;
  for (int64_t i = threadIdx.x; i < plan.splits; i += kBlock) {
    sum += partials[i].grad_tanh;
    at_largest += partials[i].at_largest;
  }
  sum = block_sum(sum);
  at_largest = block_sum(at_largest);
  // Not m * m, which underflows where every weight is tiny.
  return static_cast<float>(sum) / m / m / static_cast<float>(at_largest);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    dorefa_weight_backward_at_largest_kernel(const T* w, const T* grad, T* dw, bool vectorizable, RangePlan plan,
                                             const float* largest, const DorefaPartial* partials) {
  const int64_t numel = plan.view.inner;
  for (int64_t stretch = blockIdx.x; stretch < plan.splits; stretch += gridDim.x) {
    if (partials[stretch].at_largest == 0) continue;
    const float m = tanh_lane(*largest), through = gradient_of_largest(plan, partials, m);
    for_stretch(plan, stretch, [&](int64_t begin) {
      const Group<T> weights = load_group(w, begin, numel, vectorizable);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        // Lanes beyond the end are NaN, which equals nothing.
        const float t = tanh_lane(to_float(weights.lane[j]));
        if (magnitude(t) != m) continue;
        const float above = to_float(grad[begin + j]) / m - (t < 0.0f ? -through : through);
        dw[begin + j] = from_float<T>(above * (1.0f - t * t));
      }
    });
  }
}

template <class T>
cudaError_t launch_transform(const DorefaWeightArguments& a, cudaStream_t stream) {
  const T* w = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const bool vectorizable = is_vectorizable(w, 1, a.numel);
  if (a.steps == 1.0f) {
    return launch_over_groups(dorefa_sign_kernel<T>, a.numel, stream, w, y, a.numel, a.largest, vectorizable);
  }
  return launch_over_groups(dorefa_weight_kernel<T>, a.numel, stream, w, y, a.numel, a.steps, a.largest, vectorizable);
}

cudaError_t launch_maximum(const DorefaWeightArguments& a, const RangePlan& plan, void* workspace,
                           cudaStream_t stream) {
  Range* partials = static_cast<Range*>(workspace);
  const cudaError_t error = launch_ranges(a.dtype, a.x, plan, partials, nullptr, nullptr, stream);
  return error != cudaSuccess ? error : launch_largest(plan, partials, a.largest, stream);
}

cudaError_t launch_mean(const DorefaWeightArguments& a, const RangePlan& plan, void* workspace, cudaStream_t stream) {
  double* partials = static_cast<double*>(workspace);
  const cudaError_t error = for_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(magnitude_sum_kernel<T>, plan.splits, kBlock, stream, static_cast<const T*>(a.x),
                  is_vectorizable(a.x, 1, a.numel), plan, partials);
  });
  return error != cudaSuccess ? error : launch(mean_kernel, 1, kWarp, stream, plan, partials, a.largest);
}

template <class T>
cudaError_t launch_gradient(const DorefaWeightBackwardArguments& a, const RangePlan& plan, DorefaPartial* partials,
                            cudaStream_t stream) {
  const T *w = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  T* dw = static_cast<T*>(a.dx);
  const bool vectorizable =
      is_vectorizable(w, 1, a.numel) && is_vectorizable(grad, 1, a.numel) && is_vectorizable(dw, 1, a.numel);
  const cudaError_t error = launch(dorefa_weight_backward_kernel<T>, plan.splits, kBlock, stream, w, grad, dw,
                                   vectorizable, plan, a.largest, partials);
  if (error != cudaSuccess) return error;
  return launch(dorefa_weight_backward_at_largest_kernel<T>, plan.splits, kBlock, stream, w, grad, dw, vectorizable,
                plan, a.largest, partials);
}

}  // namespace

cudaError_t dorefa_weight_workspace_bytes(int64_t numel, int64_t& bytes) {
  RangePlan plan;
  const cudaError_t error = plan_ranges({1, 1, numel}, plan);
  // The backward's partial results are the largest.
  bytes = plan.partials() * static_cast<int64_t>(sizeof(DorefaPartial));
  return error;
}

cudaError_t launch_dorefa_weight(const DorefaWeightArguments& a, void* workspace, cudaStream_t stream) {
  RangePlan plan;
  cudaError_t error = plan_ranges({1, 1, a.numel}, plan);
  if (error != cudaSuccess) return error;
  error = a.steps == 1.0f ? launch_mean(a, plan, workspace, stream) : launch_maximum(a, plan, workspace, stream);
  if (error != cudaSuccess) return error;
  return for_dtype(a.dtype,
                   [&](auto* type) { return launch_transform<std::remove_pointer_t<decltype(type)>>(a, stream); });
}

cudaError_t launch_dorefa_weight_backward(const DorefaWeightBackwardArguments& a, void* workspace,
                                          cudaStream_t stream) {
  RangePlan plan;
  const cudaError_t error = plan_ranges({1, 1, a.numel}, plan);
  if (error != cudaSuccess) return error;
  DorefaPartial* partials = static_cast<DorefaPartial*>(workspace);
  return for_dtype(a.dtype, [&](auto* type) {
    return launch_gradient<std::remove_pointer_t<decltype(type)>>(a, plan, partials, stream);
  });
}

}  // namespace quantkern::cuda
