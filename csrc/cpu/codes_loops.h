// Fake-quantized float32 as one byte an element and back, behind one table per instruction set. No torch.
#pragma once

#include "fake_quantize_loops.h"

namespace quantkern::cpu {

struct CodesLoops {
  // codes of x on [begin, end); whether every one of them gives its element back to the last bit.
  bool (*encode)(const float* x, uint8_t* codes, int64_t begin, int64_t end, const ChannelParams& params);
  void (*decode)(const uint8_t* codes, float* x, int64_t begin, int64_t end, const ChannelParams& params,
                 bool streamed);
};

const CodesLoops& codes_loops();

}  // namespace quantkern::cpu
