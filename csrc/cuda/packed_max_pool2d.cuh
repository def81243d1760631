// Launcher of the max pooling of packed images.
#pragma once

#include "../numerics/window.h"
#include "launch.cuh"

namespace quantkern::cuda {

// x [images, height, width, words], flip [words], y [images, out_height, out_width, words]
cudaError_t launch_packed_max_pool2d(const uint32_t* x, const uint32_t* flip, uint32_t* y, const Window& window,
                                     cudaStream_t stream);

}  // namespace quantkern::cuda
