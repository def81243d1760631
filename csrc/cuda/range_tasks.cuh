// What one block does of finding ranges: one task of a RangePlan. Called by all threads of a block of kBlock.
#pragma once

#include "ranges.cuh"

namespace quantkern::cuda {

// One split of one channel, its threads stride over the groups of eight elements.
template <class T>
__device__ __forceinline__ void range_of_rows(const T* x, bool vectorizable, const RangePlan& plan, Range* partials,
                                              int64_t task) {
  const ChannelView view = plan.view;
  const int64_t row_groups = ceil_div(view.inner, kGroup), groups = view.outer * row_groups;
  const int64_t split = task / view.channels, channel = task - split * view.channels;
  const int64_t first = split * plan.chunk, end = min_lane(first + plan.chunk, groups);
  Range range = empty_range();
  for (int64_t group = first + threadIdx.x; group < end; group += kBlock) {
    const int64_t row = view.outer == 1 ? 0 : group / row_groups;
    const T* start = x + (row * view.channels + channel) * view.inner;
    const int64_t begin = (group - row * row_groups) * kGroup;
    range = merge(range, range_of(load_group(start, begin, view.inner, vectorizable)));
  }
  range = block_range(range);
  if (threadIdx.x == 0) partials[task] = range;
}

// Up to 32 groups of columns and one split of the rows; each thread keeps eight columns, and the rows of threads are
// folded in shared memory.
template <class T>
__device__ __forceinline__ void range_of_columns(const T* x, bool vectorizable, const RangePlan& plan,
                                                 const ColumnTile& t, Range* partials, int64_t task) {
  __shared__ Range shared[kGroup][kBlock];
  const int row_lane = static_cast<int>(threadIdx.x) / t.tile, group_lane = static_cast<int>(threadIdx.x) % t.tile;
  const int64_t split = task / t.tiles, column = ((task - split * t.tiles) * t.tile + group_lane) * kGroup;
  const bool active = row_lane < t.rows && column < t.columns;
  const int64_t first = split * plan.chunk, end = active ? min_lane(first + plan.chunk, plan.view.outer) : 0;
  Range range[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) range[j] = empty_range();
  for (int64_t row = first + row_lane; row < end; row += t.rows) {
    const Group<T> group = load_group(x + row * t.columns, column, t.columns, vectorizable);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) range[j] = merge(range[j], {to_float(group.lane[j]), to_float(group.lane[j])});
  }
#pragma unroll
  for (int j = 0; j < kGroup; ++j) shared[j][threadIdx.x] = range[j];
  fold_rows(shared, t);
  // Row 0 reads only what it wrote itself.
  for (int j = 0; j < kGroup && row_lane == 0 && column + j < t.columns; ++j) {
    partials[split * t.columns + column + j] = shared[j][threadIdx.x];
  }
  __syncthreads();
}

}  // namespace quantkern::cuda
