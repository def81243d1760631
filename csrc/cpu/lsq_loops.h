// The loops of the learned step size's backward, behind one table per instruction set. No torch.
#pragma once

#include <cstdint>

#include "fake_quantize_loops.h"

namespace quantkern::cpu {

// Sums over one stretch of elements.
struct LsqSums {
  double dscale = 0, dzero_point = 0;
};

struct LsqLoops {
  // dx on [begin, end), all of one channel; returns that stretch's part of the other gradients. dx may be grad, of
  // which only what changes is then written.
  LsqSums (*gradient)(DType dtype, const void* x, const void* grad, void* dx, int64_t begin, int64_t end,
                      const ChannelParams& params, int64_t channel, bool streamed);
  // dx on [begin, end), element i in column i % params.channels (params.inner == 1, begin a multiple of the period);
  // the other gradients are added to dscale[column] and, unless it is null, dzero_point[column].
  void (*column_gradient)(DType dtype, const void* x, const void* grad, void* dx, int64_t begin, int64_t end,
                          const ChannelParams& params, float* dscale, float* dzero_point);
};

const LsqLoops& lsq_loops();

}  // namespace quantkern::cpu
