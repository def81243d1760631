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

#include "range_tasks.cuh"

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
  for (int64_t task = blockIdx.x; task < plan.splits * plan.view.channels; task += gridDim.x) {
    range_of_rows(x, vectorizable, plan, partials, task);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    ranges_by_column_kernel(const T* x, bool vectorizable, RangePlan plan, Range* partials, const bool* observing,
                            int* blocked) {
  if (!begin_ranges(observing, blocked)) return;
  const ColumnTile t = tile_columns(plan.view);
  for (int64_t task = blockIdx.x; task < plan.splits * t.tiles; task += gridDim.x) {
    range_of_columns(x, vectorizable, plan, t, partials, task);
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
