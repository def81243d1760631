// Fake-quantized float32 as one byte an element, and back.
//
//   code = rint(x / scale) + zero_point - quant_min,  x = (code + quant_min - zero_point) * scale
//
// Layout: codes in the order x's elements lie in memory; element i has the parameters of channel
// (i / inner) % channels.
// Grid: one thread owns eight consecutive elements, then strides by the whole grid. The launcher clears the last of the
// parameters; a thread that loses something sets it, whichever comes last.
// Bytes an element: 4 read and 1 written, and the other way round.
// Numerics: numerics/affine_lane.h, so that the decoded number is the very product that fake_quantize made.
#include "codes.cuh"

#include "../numerics/affine.h"
#include "vector_io.cuh"

namespace quantkern::cuda {
namespace {

struct alignas(kGroup) Bytes {
  uint8_t lane[kGroup];
};

__device__ __forceinline__ Affine<float> params_of(const float* scale, const int* zero_point, int64_t channel) {
  const float zero = zero_point == nullptr ? 0.0f : static_cast<float>(zero_point[channel]);
  return {reciprocal_scale(scale[channel]), scale[channel], zero};
}

__global__ void __launch_bounds__(kBlock) to_codes_kernel(CodesArguments a, bool x_vectorizable) {
  const int64_t numel = a.view.numel(), stride = static_cast<int64_t>(gridDim.x) * kBlock;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  for (int64_t c = first; c < a.view.channels; c += stride) {
    a.parameters[c] = a.scale[c];
    a.parameters[a.view.channels + c] = a.zero_point == nullptr ? 0.0f : static_cast<float>(a.zero_point[c]);
  }
  const float low = static_cast<float>(a.quant_min), most = static_cast<float>(a.quant_max - a.quant_min);
  bool exact = true;
  for (int64_t index = first; index * kGroup < numel; index += stride) {
    const int64_t begin = index * kGroup;
    const Group<float> group = load_group(a.x, begin, numel, x_vectorizable);
    Bytes bytes;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int64_t channel = a.view.channels == 1 ? 0 : (begin + j) / a.view.inner % a.view.channels;
      const Affine<float> p = params_of(a.scale, a.zero_point, channel);
      const float code = round_even(min_lane(most, max_lane(0.0f, code_lane(group.lane[j], p, low))));
      bytes.lane[j] = static_cast<uint8_t>(static_cast<int>(code));
      exact = exact && (decode_lane(code, p, low) == group.lane[j] || begin + j >= numel);
    }
    if (begin + kGroup <= numel) {
      *reinterpret_cast<Bytes*>(a.codes + begin) = bytes;
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (begin + j < numel) a.codes[begin + j] = bytes.lane[j];
    }
  }
  if (!exact) a.parameters[2 * a.view.channels] = 1.0f;
}

__global__ void __launch_bounds__(kBlock)
    from_codes_kernel(const uint8_t* codes, const float* parameters, float* x, ChannelView view, float quant_min) {
  const int64_t numel = view.numel(), stride = static_cast<int64_t>(gridDim.x) * kBlock;
  const bool lost = parameters[2 * view.channels] != 0.0f;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index * kGroup < numel;
       index += stride) {
    const int64_t begin = index * kGroup;
    Bytes bytes = {};
    if (begin + kGroup <= numel) {
      bytes = *reinterpret_cast<const Bytes*>(codes + begin);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (begin + j < numel) bytes.lane[j] = codes[begin + j];
    }
    Group<float> group;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const int64_t channel = view.channels == 1 ? 0 : (begin + j) / view.inner % view.channels;
      const Affine<float> p = {0.0f, lost ? __builtin_nanf("") : parameters[channel],
                               parameters[view.channels + channel]};
      group.lane[j] = decode_lane(static_cast<float>(bytes.lane[j]), p, quant_min);
    }
    store_group(x, begin, numel, true, group);
  }
}

}  // namespace

cudaError_t launch_to_codes(const CodesArguments& a, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(a.parameters + 2 * a.view.channels, 0, sizeof(float), stream);
  if (error != cudaSuccess) return error;
  return launch_over_groups(to_codes_kernel, std::max(a.view.numel(), a.view.channels), stream, a,
                            is_vectorizable(a.x, 1, a.view.numel()));
}

cudaError_t launch_from_codes(const uint8_t* codes, const float* parameters, float* x, const ChannelView& view,
                              int quant_min, cudaStream_t stream) {
  if (view.numel() == 0) return cudaSuccess;
  return launch_over_groups(from_codes_kernel, view.numel(), stream, codes, parameters, x, view,
                            static_cast<float>(quant_min));
}

}  // namespace quantkern::cuda
