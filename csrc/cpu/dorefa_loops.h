// The loops of DoReFa's transforms, behind one table per instruction set. No torch.
#pragma once

#include <cstdint>

#include "../numerics/dtype.h"

namespace quantkern::cpu {

// What one stretch of a weight's backward leaves for the gradient that goes through the maximum.
struct DorefaSums {
  double grad_tanh = 0;
  int64_t at_largest = 0;
};

// Every loop works on [begin, end) of tensors in the same memory order; float32 and the 16-bit formats.
struct DorefaLoops {
  // width = 2 * tanh(max|w|), steps = 2^bits - 1
  void (*weight)(DType dtype, const void* w, void* y, int64_t begin, int64_t end, float width, float steps);
  // y = +-value with the sign of w, sign(0) = +1, NaN stays
  void (*sign)(DType dtype, const void* w, void* y, int64_t begin, int64_t end, float value);
  double (*magnitude_sum)(DType dtype, const void* w, int64_t begin, int64_t end);
  // dw without the part through the maximum m = tanh(max|w|)
  DorefaSums (*weight_gradient)(DType dtype, const void* w, const void* grad, void* dw, int64_t begin, int64_t end,
                                float largest);
  // dw once more where |tanh(w)| = m, now with that part
  void (*weight_gradient_at_largest)(DType dtype, const void* w, const void* grad, void* dw, int64_t begin, int64_t end,
                                     float largest, float through_largest);
  // mask may be null; begin is a multiple of kStretch
  void (*activation)(DType dtype, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end, float steps);
  // width = 2 * max|g| of the sample that holds the whole stretch
  void (*gradient)(DType dtype, const void* grad, void* out, int64_t begin, int64_t end, float width, float steps,
                   uint64_t seed);
};

const DorefaLoops& dorefa_loops();

}  // namespace quantkern::cpu
