// Launcher of all weights at once, each on the grid of its scale.
#pragma once

#include "fake_quantize.cuh"

namespace quantkern::cuda {

// Tensors without elements are left out.
cudaError_t launch_lsq_weights(const FakeQuantizeArguments* weights, int64_t count, cudaStream_t stream);

}  // namespace quantkern::cuda
