// Minimum and maximum of every channel: how the work is cut up, and how its parts come together again.
#pragma once

#include "reduce.cuh"

namespace quantkern::cuda {

// Every channel is read by `splits` blocks, each of which leaves `width` ranges:
//   by row     the channel's rows of `inner` consecutive elements; width 1; `chunk` counts groups of elements
//   by column  rows too short for that (channels_last): all columns at once; width inner; `chunk` counts rows
// partials[(split * channels + channel) * width + i]
// Sums over channels (lsq.cu, dorefa_weight.cu) are cut up the same way.
struct RangePlan {
  ChannelView view;
  bool by_column;
  int64_t splits, chunk;
  QK_HOST_DEVICE int64_t width() const { return by_column ? view.inner : 1; }
  QK_HOST_DEVICE int64_t partials() const { return splits * view.channels * width(); }
};

cudaError_t plan_ranges(const ChannelView& view, RangePlan& plan);

// observing: null, or a flag on the device; while it is false x is not read and the partials are left as they are.
// blocked: null, or a flag that is set to 0.
cudaError_t launch_ranges(DType dtype, const void* x, const RangePlan& plan, Range* partials, const bool* observing,
                          int* blocked, cudaStream_t stream);

// largest[channel] = max|x| of every channel from those partials, 0 where it has no values.
cudaError_t launch_largest(const RangePlan& plan, const Range* partials, float* largest, cudaStream_t stream);

// How the threads of a block by column lie: `tile` groups of columns, `rows` rows of threads; the rest stays idle.
struct ColumnTile {
  int64_t columns, tiles;
  int tile, rows;
};

QK_HOST_DEVICE ColumnTile tile_columns(const ChannelView& view) {
  const int64_t columns = view.channels * view.inner, groups = ceil_div(columns, kGroup);
  const int tile = groups < kWarp ? static_cast<int>(groups) : kWarp;
  return {columns, ceil_div(groups, tile), tile, kBlock / tile};
}

// Folds the rows of threads into row 0, halving their number each time. Called by the whole block.
template <class Part>
__device__ __forceinline__ void fold_rows(Part (*shared)[kBlock], const ColumnTile& t) {
  const int row = static_cast<int>(threadIdx.x) / t.tile;
  for (int live = t.rows; live > 1; live = (live + 1) / 2) {
    const int half = (live + 1) / 2;
    __syncthreads();
    if (row + half < live) {
      for (int j = 0; j < kGroup; ++j) {
        shared[j][threadIdx.x] = merge(shared[j][threadIdx.x], shared[j][threadIdx.x + half * t.tile]);
      }
    }
  }
}

// The range of a channel from its partials, in a fixed order; called by whole warps, every lane gets it.
__device__ __forceinline__ Range combine_partials(const RangePlan& plan, const Range* partials, int64_t channel) {
  const int64_t width = plan.width(), count = plan.splits * width;
  Range range = empty_range();
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) {
    const int64_t split = i / width;
    range = merge(range, partials[(split * plan.view.channels + channel) * width + (i - split * width)]);
  }
  return warp_range(range);
}

}  // namespace quantkern::cuda
