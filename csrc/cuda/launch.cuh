// How kernels are launched and how they see a tensor. No torch; host compilers can include this file.
//
// Sizes and indices are 64-bit. Every kernel strides over its work, so any grid is right and a grid never exceeds
// what CUDA allows. Launchers return the CUDA error of the launch; the caller turns it into an exception.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../numerics/platform.h"

namespace quantkern::cuda {

constexpr int kWarp = 32;
constexpr int kBlock = 256;
// Elements a thread handles together: one byte of the mask, one or two 16-byte accesses.
constexpr int kGroup = 8;
// Five to eight blocks of 256 threads fill a multiprocessor; a grid of several such waves evens out their ends.
constexpr int kBlocksPerMultiprocessor = 32;

// Elements in the order they lie in memory: element i belongs to channel (i / inner) % channels.
struct ChannelView {
  int64_t outer, channels, inner;
  QK_HOST_DEVICE int64_t numel() const { return outer * channels * inner; }
};

// What keeps an operation the identity: a step before its start, or a flag written by an earlier kernel.
struct Gate {
  const int64_t* step = nullptr;
  int64_t start_step = 0;
  const int* blocked = nullptr;
};

QK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaError_t count_multiprocessors(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// Launches at least one and at most as many blocks as a grid can hold.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, INT32_MAX)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// One thread a group of elements, as long as that does not take too many blocks.
template <class... Parameters, class... Arguments>
cudaError_t launch_over_groups(void (*kernel)(Parameters...), int64_t numel, cudaStream_t stream,
                               Arguments... arguments) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>(ceil_div(ceil_div(numel, kGroup), kBlock),
                                           static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor);
  return launch(kernel, blocks, kBlock, stream, arguments...);
}

}  // namespace quantkern::cuda
