// Fake-quantize and its backward.
//
//   q = clamp(rint(x * (1 / scale)) + zero_point, quant_min, quant_max),  y = (q - zero_point) * scale
//   mask bit = 1 where the rounded value lies in [quant_min, quant_max];  backward: grad where the bit is 1, else 0
//
// Layout: x, y and the mask in the order x's elements lie in memory; element i has the parameters of channel
// (i / inner) % channels. Bit i % 8 of byte i / 8 is element i.
// Grid: one thread owns eight consecutive elements and their mask byte, then strides by the whole grid. Blocks of
// 256 threads, at most 32 a multiprocessor.
// Bytes an element: forward reads x and writes y and 1/8 byte of mask, 8.125 in float32, 4.125 in 16
// bits, 6.125 from the one to the other; the backward moves the same, and in place only the groups of eight in which a
// gradient stops, 1/8 byte at best.
// Numerics: float32 for every element type, IEEE division, no contraction (numerics/affine.h). While the gate is
// closed elements are moved without conversion, so that y is x bit for bit.
#include "fake_quantize.cuh"

#include <type_traits>

#include "quantize_group.cuh"

namespace quantkern::cuda {
namespace {

enum class Granularity {
  kTensor,   // one scale and zero point
  kRows,     // inner is a multiple of 8: a group lies inside one channel
  kElements  // any layout: neighbours may belong to different channels
};

template <class T, class Y, Granularity kGranularity>
__global__ void __launch_bounds__(kBlock)
    fake_quantize_kernel(const T* x, Y* y, uint8_t* mask, ChannelView view, Parameters parameters, Gate gate,
                         float quant_min, float quant_max, ClipBounds clip, bool x_vectorizable) {
  const bool open = is_open(gate);
  const int64_t numel = view.numel(), stride = static_cast<int64_t>(gridDim.x) * kBlock;
  Affine<float> affine = {};
  if (kGranularity == Granularity::kTensor) affine = affine_of(parameters, 0);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index * kGroup < numel;
       index += stride) {
    const int64_t begin = index * kGroup;
    Group<T> group = load_group(x, begin, numel, x_vectorizable);
    const unsigned inside = clip.wanted ? clip_in_place(group, clip.lower, clip.upper) : 0xffu;
    unsigned bits = 0xffu;
    if (open) {
      if (kGranularity == Granularity::kElements) {
        bits = quantize_across_rows(group, begin, view, parameters, quant_min, quant_max);
      } else {
        if (kGranularity == Granularity::kRows) affine = affine_of(parameters, begin / view.inner % view.channels);
        bits = quantize_in_place(group, affine, quant_min, quant_max);
      }
    }
    store_group(y, begin, numel, true, converted<Y>(group));
    if (mask != nullptr) mask[index] = static_cast<uint8_t>(bits & inside & element_bits(begin, numel));
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    fake_quantize_backward_kernel(const T* grad, const uint8_t* mask, T* out, int64_t numel, bool grad_vectorizable) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index * kGroup < numel;
       index += stride) {
    const int64_t begin = index * kGroup;
    const unsigned bits = mask[index];
    if (grad == out && bits == element_bits(begin, numel)) continue;
    Group<T> group = load_group(grad, begin, numel, grad_vectorizable);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (!(bits >> j & 1u)) group.lane[j] = from_float<T>(0.0f);
    }
    store_group(out, begin, numel, true, group);
  }
}

template <class T, class Y, Granularity kGranularity>
cudaError_t launch_forward(const FakeQuantizeArguments& a, cudaStream_t stream) {
  const int64_t numel = a.view.numel();
  return launch_over_groups(fake_quantize_kernel<T, Y, kGranularity>, numel, stream, static_cast<const T*>(a.x),
                            static_cast<Y*>(a.y), a.mask, a.view, a.parameters, a.gate, static_cast<float>(a.quant_min),
                            static_cast<float>(a.quant_max), a.clip, is_vectorizable(a.x, 1, numel));
}

}  // namespace

cudaError_t launch_fake_quantize(const FakeQuantizeArguments& a, cudaStream_t stream) {
  if (a.view.numel() == 0) return cudaSuccess;
  return for_dtype_pair(a.dtype, a.y_dtype.value_or(a.dtype), [&](auto* of_x, auto* of_y) {
    using T = std::remove_pointer_t<decltype(of_x)>;
    using Y = std::remove_pointer_t<decltype(of_y)>;
    if (a.view.channels == 1) return launch_forward<T, Y, Granularity::kTensor>(a, stream);
    if (a.view.inner % kGroup == 0) return launch_forward<T, Y, Granularity::kRows>(a, stream);
    return launch_forward<T, Y, Granularity::kElements>(a, stream);
  });
}

cudaError_t launch_fake_quantize_backward(DType dtype, const void* grad, const uint8_t* mask, void* out, int64_t numel,
                                          cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_over_groups(fake_quantize_backward_kernel<T>, numel, stream, static_cast<const T*>(grad), mask,
                              static_cast<T*>(out), numel, is_vectorizable(grad, 1, numel));
  });
}

}  // namespace quantkern::cuda
