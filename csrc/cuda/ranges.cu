// Minimum and maximum of every channel, the first of the two passes over x of the operations that choose scales.
//
//   partials[split, channel, i] = (min, max) over a part of the channel, NaN left out
//
// Layout: x in the order it lies in memory, [outer, channels, inner]; see RangePlan for the partials.
// Grid, by row: one block owns one split of one channel, its threads stride over the groups of eight elements.
// Grid, by column: one block owns up to 32 groups of columns and one split of the rows; its threads lie as
// rows x groups, each keeps eight columns, and the rows of threads are folded in shared memory.
// Bytes an element: reads x once, 4 in float32 and 2 in 16 bits; nothing while observing is off.
// Numerics: comparisons only, so the result does not depend on how the work was cut up.
#include "ranges.cuh"

#include <type_traits>

namespace quantkern::cuda {
namespace {

// Rows shorter than this are read by column: a block by row would find too little to do in each.
constexpr int64_t kShortRow = 32;
// Blocks that read at the same time on one multiprocessor. Each leaves a partial that one warp combines later.
constexpr int64_t kRangeBlocksPerMultiprocessor = 8;
// Steps of a thread below which splitting further costs more than it brings.
constexpr int64_t kMinSteps = 4;

// Whether the block goes on to read x. The flag is cleared either way: a later kernel may set it.
__device__ __forceinline__ bool begin_ranges(const bool* observing, int* blocked) {
  if (blocked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *blocked = 0;
  return observing == nullptr || *observing;
}

template <class T>
__global__ void __launch_bounds__(kBlock) ranges_by_row_kernel(const T* x, bool vectorizable, RangePlan plan,
                                                               Range* partials, const bool* observing, int* blocked) {
  if (!begin_ranges(observing, blocked)) return;
  const ChannelView view = plan.view;
  const int64_t row_groups = ceil_div(view.inner, kGroup), groups = view.outer * row_groups;
  for (int64_t task = blockIdx.x; task < plan.splits * view.channels; task += gridDim.x) {
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
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    ranges_by_column_kernel(const T* x, bool vectorizable, RangePlan plan, Range* partials, const bool* observing,
                            int* blocked) {
  __shared__ Range shared[kGroup][kBlock];
  if (!begin_ranges(observing, blocked)) return;
  const ColumnTile t = tile_columns(plan.view);
  const int row_lane = static_cast<int>(threadIdx.x) / t.tile, group_lane = static_cast<int>(threadIdx.x) % t.tile;
  for (int64_t task = blockIdx.x; task < plan.splits * t.tiles; task += gridDim.x) {
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
}

// Blocks of one warp, one a channel.
__global__ void __launch_bounds__(kWarp) largest_kernel(RangePlan plan, const Range* partials, float* largest) {
  for (int64_t channel = blockIdx.x; channel < plan.view.channels; channel += gridDim.x) {
    const Range range = combine_partials(plan, partials, channel);
    if (threadIdx.x == 0) largest[channel] = is_seen(range) ? max_lane(-range.min, range.max) : 0.0f;
  }
}

}  // namespace

cudaError_t plan_ranges(const ChannelView& view, RangePlan& plan) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return error;
  plan = {view, view.outer > 1 && view.inner < kShortRow, 0, 0};
  if (view.numel() == 0) return cudaSuccess;
  const ColumnTile t = tile_columns(view);
  const int64_t tasks = plan.by_column ? t.tiles : view.channels;
  const int64_t work = plan.by_column ? view.outer : view.outer * ceil_div(view.inner, kGroup);
  const int64_t threads = plan.by_column ? t.rows : kBlock;
  const int64_t wanted = ceil_div(multiprocessors * kRangeBlocksPerMultiprocessor, tasks);
  const int64_t useful = ceil_div(work, threads * kMinSteps);
  plan.chunk = ceil_div(work, std::min(wanted, useful));
  plan.splits = ceil_div(work, plan.chunk);
  return cudaSuccess;
}

cudaError_t launch_ranges(DType dtype, const void* x, const RangePlan& plan, Range* partials, const bool* observing,
                          int* blocked, cudaStream_t stream) {
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const ChannelView& view = plan.view;
    const T* typed = static_cast<const T*>(x);
    if (plan.by_column) {
      const bool vectorizable = is_vectorizable(x, view.outer, view.channels * view.inner);
      return launch(ranges_by_column_kernel<T>, plan.splits * tile_columns(view).tiles, kBlock, stream, typed,
                    vectorizable, plan, partials, observing, blocked);
    }
    const bool vectorizable = is_vectorizable(x, view.outer * view.channels, view.inner);
    return launch(ranges_by_row_kernel<T>, plan.splits * view.channels, kBlock, stream, typed, vectorizable, plan,
                  partials, observing, blocked);
  });
}

cudaError_t launch_largest(const RangePlan& plan, const Range* partials, float* largest, cudaStream_t stream) {
  return launch(largest_kernel, plan.view.channels, kWarp, stream, plan, partials, largest);
}

}  // namespace quantkern::cuda
