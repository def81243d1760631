// The loops of fake-quantization over a stretch of memory, behind one table per instruction set. No torch.
#pragma once

#include <cstdint>

#include "../numerics/dtype.h"
#include "../numerics/ranges.h"

namespace quantkern::cpu {

// A loop may be handed any stretch that begins at a multiple of this many elements: mask bytes then belong to
// exactly one stretch, whichever thread works on it.
constexpr int64_t kStretch = 64;

// Widest group of lanes any instruction set works on; vectors of parameters are padded by as much.
constexpr int64_t kMaxLanes = 16;

// inverse, scale and zero_point of every channel. With inner == 1 element i belongs to channel i % channels and the
// vectors repeat themselves for kMaxLanes entries past their end, so that a group may be loaded at any channel.
struct ChannelParams {
  const float *inverse, *scale, *zero_point;
  int64_t channels, inner;
  float quant_min, quant_max;
  // x is first clipped to these where `clips`, and the mask is 0 at and beyond them.
  double lower = 0, upper = 0;
  bool clips = false;
};

// streamed: write past the caches. Everything written must then lie at the start of an allocation, as out tensors do.
struct FakeQuantizeLoops {
  // y = fake_quantize(x) on [begin, end); mask may be null. out: y's type, dtype or a 16-bit type for float32.
  void (*quantize)(DType dtype, DType out, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end,
                   const ChannelParams& params, bool streamed);
  // y = x within [lower, upper] on [begin, end), mask bits strictly between; mask may be null, y may be x.
  void (*clip)(DType dtype, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end, double lower,
               double upper, bool streamed);
  // out = grad where the mask bit is 1, else 0, on [begin, end); elements of 2, 4 or 8 bytes.
  void (*select)(int64_t element_size, const void* grad, const uint8_t* mask, void* out, int64_t begin, int64_t end,
                 bool streamed);
  // The same in place: where all bits are 1 the elements are not even read.
  void (*select_in_place)(int64_t element_size, void* grad, const uint8_t* mask, int64_t begin, int64_t end);
  // Smallest and largest value on [begin, end), NaN left out.
  Range (*range)(DType dtype, const void* x, int64_t begin, int64_t end);
  // low[j], high[j] take in every element i of [begin, end) with i % period == j; begin % period == 0.
  void (*column_ranges)(DType dtype, const void* x, int64_t begin, int64_t end, int64_t period, float* low,
                        float* high);
};

// The table of the instruction set in force.
const FakeQuantizeLoops& fake_quantize_loops();

}  // namespace quantkern::cpu
