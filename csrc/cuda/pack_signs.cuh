// Launchers between real tensors and packed signs: pointers, sizes and a stream, no torch.
#pragma once

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

struct PackArguments {
  DType dtype;
  const void* x;     // [outer, k, inner]
  uint32_t* packed;  // [outer, inner, words]
  ChannelView view;  // channels: k
};

cudaError_t launch_pack_signs(const PackArguments& arguments, cudaStream_t stream);

struct UnpackArguments {
  DType dtype;
  const uint32_t* packed;  // [rows, words]
  void* y;                 // [rows, k], 16-byte aligned
  int64_t rows, k;
};

cudaError_t launch_unpack_signs(const UnpackArguments& arguments, cudaStream_t stream);

// counts[r] = the ones among all the bits of row r of packed [rows, words].
cudaError_t launch_count_signs(const uint32_t* packed, int64_t rows, int64_t words, int* counts, cudaStream_t stream);

}  // namespace quantkern::cuda
