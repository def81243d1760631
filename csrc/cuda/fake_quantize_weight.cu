// The weight path: the range of every channel now, its scale and zero point, and the fake-quantized tensor.
//
//   (min, max) -> scale, zero_point (numerics/ranges.h) -> y as in fake_quantize.cu
//
// Layout: x, y and the mask in the order x lies in memory, [outer, channels, inner]; scale and zero point [channels].
// Grid, rows that fit a block (outer == 1): one block owns a channel and keeps it in registers between the range and
// y, so x is read once. Grid, otherwise: ranges.cu, then one warp a channel for the scale, then fake_quantize.cu.
// Bytes an element: 8 in float32, 4 in 16 bits and 6 from the one to the other when a block owns a channel, else 12, 6
// and 10; plus 1/8 for the mask.
// Numerics: a channel without values gets the smallest scale; scale and zero point are written also while the step
// has not come, only y is then x.
#include "fake_quantize_weight.cuh"

#include <type_traits>

#include "quantize_group.cuh"
#include "ranges.cuh"
#include "weight_choice.cuh"

namespace quantkern::cuda {
namespace {

constexpr int kRowBlock = 512;
// Groups a thread of the row kernel keeps in registers, at most.
constexpr int kMaxRowGroups = 4;

template <class T, class Y, int kGroups>
__global__ void __launch_bounds__(kRowBlock)
    quantize_weight_row_kernel(const T* x, Y* y, uint8_t* mask, ChannelView view, Choice choice, Gate gate,
                               bool x_vectorizable, bool y_vectorizable) {
  const bool open = is_open(gate);
  const float quant_min = static_cast<float>(choice.quant_min), quant_max = static_cast<float>(choice.quant_max);
  for (int64_t channel = blockIdx.x; channel < view.channels; channel += gridDim.x) {
    const int64_t start = channel * view.inner;
    Group<T> groups[kGroups];
    Range range = empty_range();
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int64_t begin = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kGroup;
      groups[k] = load_group(x + start, begin, view.inner, x_vectorizable);
    }
#pragma unroll
    for (int k = 0; k < kGroups; ++k) range = merge(range, range_of(groups[k]));
    const ScaleZeroPoint chosen = choose(block_range(range), choice);
    if (threadIdx.x == 0) write(chosen, channel, choice);
    const Affine<float> affine = make_affine(chosen.scale, static_cast<float>(chosen.zero_point));
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int64_t begin = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * kGroup;
      if (begin >= view.inner) break;
      unsigned bits = 0xffu;
      if (open) bits = quantize_in_place(groups[k], affine, quant_min, quant_max);
      store_group(y + start, begin, view.inner, y_vectorizable, converted<Y>(groups[k]));
      if (mask != nullptr) mask[(start + begin) / kGroup] = bits & element_bits(begin, view.inner);
    }
  }
}

// One warp a channel.
__global__ void __launch_bounds__(kBlock)
    choose_weight_scale_kernel(RangePlan plan, const Range* partials, Choice choice) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t channel = (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
       channel < plan.view.channels; channel += stride) {
    const Range range = combine_partials(plan, partials, channel);
    if (threadIdx.x % kWarp == 0) write(choose(range, choice), channel, choice);
  }
}

// One block can keep a channel, and no byte of the mask belongs to two channels.
bool fits_row_kernel(const WeightArguments& a) {
  const bool own_mask = a.mask == nullptr || a.view.channels == 1 || a.view.inner % kGroup == 0;
  return a.view.outer == 1 && a.view.inner > 0 && a.view.inner <= kRowBlock * kMaxRowGroups * kGroup && own_mask;
}

template <class T, class Y>
cudaError_t launch_rows(const WeightArguments& a, const Choice& choice, cudaStream_t stream) {
  const int64_t groups = ceil_div(a.view.inner, kGroup);
  const auto run = [&](auto kernel, int kept) {
    const int threads = static_cast<int>(ceil_div(ceil_div(groups, kept), kWarp) * kWarp);
    return launch(kernel, a.view.channels, threads, stream, static_cast<const T*>(a.x), static_cast<Y*>(a.y), a.mask,
                  a.view, choice, a.gate, is_vectorizable(a.x, a.view.channels, a.view.inner),
                  is_vectorizable(a.y, a.view.channels, a.view.inner));
  };
  if (groups <= kRowBlock) return run(quantize_weight_row_kernel<T, Y, 1>, 1);
  if (groups <= 2 * kRowBlock) return run(quantize_weight_row_kernel<T, Y, 2>, 2);
  return run(quantize_weight_row_kernel<T, Y, kMaxRowGroups>, kMaxRowGroups);
}

}  // namespace

cudaError_t weight_workspace_bytes(const WeightArguments& a, int64_t& bytes) {
  bytes = 0;
  if (fits_row_kernel(a)) return cudaSuccess;
  RangePlan plan;
  const cudaError_t error = plan_ranges(a.view, plan);
  bytes = plan.partials() * static_cast<int64_t>(sizeof(Range));
  return error;
}

cudaError_t launch_fake_quantize_weight(const WeightArguments& a, void* workspace, cudaStream_t stream) {
  const Choice choice = {a.scale, a.zero_point, a.quant_min, a.quant_max, a.symmetric};
  if (fits_row_kernel(a)) {
    return for_dtype_pair(a.dtype, a.y_dtype.value_or(a.dtype), [&](auto* of_x, auto* of_y) {
      return launch_rows<std::remove_pointer_t<decltype(of_x)>, std::remove_pointer_t<decltype(of_y)>>(a, choice,
                                                                                                       stream);
    });
  }
  RangePlan plan;
  cudaError_t error = plan_ranges(a.view, plan);
  if (error != cudaSuccess) return error;
  Range* partials = static_cast<Range*>(workspace);
  error = launch_ranges(a.dtype, a.x, plan, partials, nullptr, nullptr, stream);
  if (error != cudaSuccess) return error;
  error = launch(choose_weight_scale_kernel, ceil_div(a.view.channels, kBlock / kWarp), kBlock, stream, plan, partials,
                 choice);
  if (error != cudaSuccess) return error;
  const Parameters parameters = {a.scale, a.zero_point, false, 0.0f, 0.0f};
  return launch_fake_quantize(
      {a.dtype, a.x, a.y, a.mask, a.view, parameters, a.gate, a.quant_min, a.quant_max, {}, a.y_dtype}, stream);
}

}  // namespace quantkern::cuda
