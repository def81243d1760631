// Launcher of all weights at once: current ranges, scales, zero points, fake-quantize.
#pragma once

#include "fake_quantize_weight.cuh"

namespace quantkern::cuda {

// Scratch memory the launcher needs, 16-byte aligned. Weights without elements are not allowed.
cudaError_t weights_workspace_bytes(const WeightArguments* weights, int64_t count, int64_t& bytes);

cudaError_t launch_fake_quantize_weights(const WeightArguments* weights, int64_t count, void* workspace,
                                         cudaStream_t stream);

}  // namespace quantkern::cuda
