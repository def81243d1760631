// The backward of a learned step size: the gradients of x, of every scale and of every zero point.
//
//   v = x / scale, p = v + zero_point; inside: quant_min < p < quant_max
//   dx          = grad inside, 0 outside
//   dscale      = grad_scale * sum of grad * (rint(v) - v inside, the limit - zero_point outside)
//   dzero_point = grad_scale * sum of -scale * grad outside
//
// Layout: x, grad and dx in the order x lies in memory, [outer, channels, inner]; see RangePlan for the partial sums,
// one pair a block and channel, or a block and column.
// Grid, by row: one block owns one split of one channel, its threads stride over the groups of eight elements.
// Grid, by column: one block owns up to 32 groups of columns and one split of the rows, as in ranges.cu; each thread
// keeps eight columns, their parameters and sums. Grid, combining: one warp a channel adds up the partial sums. That
// is a launch of its own: blocks that count who is last would need a counter cleared before, which is a launch too.
// Bytes an element: reads x and grad and writes dx, 12 in float32 and 6 in 16 bits; by row and in place (dx is grad)
// only groups that change are written, 8 and 4.
// Numerics: float32 lanes (numerics/lsq_lane.h); sums in float32 within a block and in float64 over blocks. Who adds
// what depends on the sizes and the device alone, never on timing, so results repeat bit for bit.
#include "lsq.cuh"

#include <type_traits>

#include "../numerics/lsq.h"
#include "quantize_group.cuh"
#include "ranges.cuh"

namespace quantkern::cuda {
namespace {

struct LsqPartial {
  float dscale, dzero_point;
};

__device__ __forceinline__ LsqPartial merge(const LsqPartial& a, const LsqPartial& b) {
  return {a.dscale + b.dscale, a.dzero_point + b.dzero_point};
}

struct LsqLimits {
  float quant_min, quant_max;
};

// Turns the gradient of one element of y into that of x and adds its part to the sums.
template <class T>
__device__ __forceinline__ T take_gradient(T x, T grad, const Affine<float>& affine, const LsqLimits& limits,
                                           LsqPartial& sums) {
  const LsqGradient<float> gradient =
      lsq_gradient_lane(to_float(x), to_float(grad), affine, limits.quant_min, limits.quant_max, 0.0f);
  sums = merge(sums, {gradient.dscale, gradient.dzero_point});
  return from_float<T>(gradient.dx);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    lsq_backward_by_row_kernel(const T* x, const T* grad, T* dx, bool vectorizable, RangePlan plan,
                               Parameters parameters, LsqLimits limits, LsqPartial* partials) {
  const ChannelView view = plan.view;
  const int64_t row_groups = ceil_div(view.inner, kGroup), groups = view.outer * row_groups;
  for (int64_t task = blockIdx.x; task < plan.splits * view.channels; task += gridDim.x) {
    const int64_t split = task / view.channels, channel = task - split * view.channels;
    const int64_t first = split * plan.chunk, end = min_lane(first + plan.chunk, groups);
    const Affine<float> affine = affine_of(parameters, channel);
    LsqPartial sums = {};
    for (int64_t group = first + threadIdx.x; group < end; group += kBlock) {
      const int64_t row = view.outer == 1 ? 0 : group / row_groups;
      const int64_t start = (row * view.channels + channel) * view.inner, begin = (group - row * row_groups) * kGroup;
      const Group<T> values = load_group(x + start, begin, view.inner, vectorizable);
      Group<T> gradients = load_group(grad + start, begin, view.inner, vectorizable);
      const unsigned elements = element_bits(begin, view.inner);
      bool changed = grad != dx;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (elements >> j & 1u) {
          const float before = to_float(gradients.lane[j]);
          gradients.lane[j] = take_gradient(values.lane[j], gradients.lane[j], affine, limits, sums);
          changed = changed || to_float(gradients.lane[j]) != before;
        }
      }
      if (changed) store_group(dx + start, begin, view.inner, vectorizable, gradients);
    }
    sums = {block_sum(sums.dscale), block_sum(sums.dzero_point)};
    if (threadIdx.x == 0) partials[task] = sums;
  }
}

// The parameters of eight columns; those beyond the last column are never used.
__device__ __forceinline__ void load_columns(Affine<float> (&affine)[kGroup], const Parameters& parameters,
                                             int64_t column, const RangePlan& plan) {
  const int64_t columns = plan.view.channels * plan.view.inner;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    affine[j] = column + j < columns ? affine_of(parameters, (column + j) / plan.view.inner) : Affine<float>{};
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    lsq_backward_by_column_kernel(const T* x, const T* grad, T* dx, bool vectorizable, RangePlan plan,
                                  Parameters parameters, LsqLimits limits, LsqPartial* partials) {
  __shared__ LsqPartial shared[kGroup][kBlock];
  const ColumnTile t = tile_columns(plan.view);
  const int row_lane = static_cast<int>(threadIdx.x) / t.tile, group_lane = static_cast<int>(threadIdx.x) % t.tile;
  for (int64_t task = blockIdx.x; task < plan.splits * t.tiles; task += gridDim.x) {
    const int64_t split = task / t.tiles, column = ((task - split * t.tiles) * t.tile + group_lane) * kGroup;
    const bool active = row_lane < t.rows && column < t.columns;
    const int64_t first = split * plan.chunk, end = active ? min_lane(first + plan.chunk, plan.view.outer) : 0;
    Affine<float> affine[kGroup];
    load_columns(affine, parameters, column, plan);
    LsqPartial sums[kGroup] = {};
    for (int64_t row = first + row_lane; row < end; row += t.rows) {
      const Group<T> values = load_group(x + row * t.columns, column, t.columns, vectorizable);
      Group<T> gradients = load_group(grad + row * t.columns, column, t.columns, vectorizable);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        gradients.lane[j] = take_gradient(values.lane[j], gradients.lane[j], affine[j], limits, sums[j]);
      }
      store_group(dx + row * t.columns, column, t.columns, vectorizable, gradients);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) shared[j][threadIdx.x] = sums[j];
    fold_rows(shared, t);
    // Row 0 reads only what it wrote itself.
    for (int j = 0; j < kGroup && row_lane == 0 && column + j < t.columns; ++j) {
      partials[split * t.columns + column + j] = shared[j][threadIdx.x];
    }
    __syncthreads();
  }
}

// One warp a channel.
__global__ void __launch_bounds__(kBlock) lsq_combine_kernel(RangePlan plan, const LsqPartial* partials,
                                                             double grad_scale, float* dscale, float* dzero_point) {
  const int64_t width = plan.width(), count = plan.splits * width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t channel = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
       channel < plan.view.channels; channel += stride) {
    double by_scale = 0.0, by_zero_point = 0.0;
    for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) {
      const int64_t split = i / width;
      const LsqPartial part = partials[(split * plan.view.channels + channel) * width + (i - split * width)];
      by_scale += static_cast<double>(part.dscale);
      by_zero_point += static_cast<double>(part.dzero_point);
    }
    by_scale = warp_sum(by_scale);
    by_zero_point = warp_sum(by_zero_point);
    if (threadIdx.x % kWarp != 0) continue;
    dscale[channel] = static_cast<float>(by_scale * grad_scale);
    if (dzero_point != nullptr) dzero_point[channel] = static_cast<float>(by_zero_point * grad_scale);
  }
}

template <class T>
cudaError_t launch_gradients(const LsqBackwardArguments& a, const RangePlan& plan, LsqPartial* partials,
                             cudaStream_t stream) {
  const int64_t rows = plan.by_column ? a.view.outer : a.view.outer * a.view.channels;
  const int64_t length = a.view.numel() / rows;
  const bool vectorizable = is_vectorizable(a.x, rows, length) && is_vectorizable(a.grad, rows, length) &&
                            is_vectorizable(a.dx, rows, length);
  const LsqLimits limits = {static_cast<float>(a.quant_min), static_cast<float>(a.quant_max)};
  const int64_t tasks = plan.splits * (plan.by_column ? tile_columns(a.view).tiles : a.view.channels);
  return launch(plan.by_column ? lsq_backward_by_column_kernel<T> : lsq_backward_by_row_kernel<T>, tasks, kBlock,
                stream, static_cast<const T*>(a.x), static_cast<const T*>(a.grad), static_cast<T*>(a.dx), vectorizable,
                plan, a.parameters, limits, partials);
}

}  // namespace

cudaError_t lsq_backward_workspace_bytes(const LsqBackwardArguments& a, int64_t& bytes) {
  RangePlan plan;
  const cudaError_t error = plan_ranges(a.view, plan);
  bytes = plan.partials() * static_cast<int64_t>(sizeof(LsqPartial));
  return error;
}

cudaError_t launch_lsq_backward(const LsqBackwardArguments& a, void* workspace, cudaStream_t stream) {
  RangePlan plan;
  cudaError_t error = plan_ranges(a.view, plan);
  if (error != cudaSuccess) return error;
  LsqPartial* partials = static_cast<LsqPartial*>(workspace);
  error = for_dtype(a.dtype, [&](auto* type) {
    return launch_gradients<std::remove_pointer_t<decltype(type)>>(a, plan, partials, stream);
  });
  if (error != cudaSuccess) return error;
  return launch(lsq_combine_kernel, ceil_div(a.view.channels, kBlock / kWarp), kBlock, stream, plan, partials,
                a.grad_scale, a.dscale, a.dzero_point);
}

}  // namespace quantkern::cuda
