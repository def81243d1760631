// The loops between real tensors and packed signs, behind one table per instruction set. No torch.
#pragma once

#include <cstdint>

#include "../numerics/dtype.h"

namespace quantkern::cpu {

struct SignLoops {
  // y = +-1, mask bits where |x| <= 1; mask may be null, begin is a multiple of kStretch
  void (*binarize)(DType dtype, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end, bool streamed);
  // Rows of k elements that lie one behind the other, packed: rows [begin, end).
  void (*pack_rows)(DType dtype, const void* x, int64_t k, uint32_t* words, int64_t begin, int64_t end);
  // Columns: x is [outer][k][inner], packed is [outer][inner][words]; columns [begin, end) of outer * inner.
  void (*pack_columns)(DType dtype, const void* x, int64_t k, int64_t inner, uint32_t* words, int64_t begin,
                       int64_t end);
  // Rows of k signs as +-1: rows [begin, end).
  void (*unpack)(DType dtype, const uint32_t* words, int64_t k, void* y, int64_t begin, int64_t end);
};

const SignLoops& sign_loops();

}  // namespace quantkern::cpu
