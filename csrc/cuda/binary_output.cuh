// Where dot products go: to numbers, or to packed signs at a threshold. Columns are output features.
#pragma once

#include "launch.cuh"

namespace quantkern::cuda {

// dot * scale + bias. Element (row, column) is y[row / plane * plane * columns + row % plane + column * plane]: rows of
// a matrix with plane 1, and with any other the planes of images [N, columns, plane].
struct FloatOutput {
  float* y;
  const float *scale, *bias;  // null: 1 and 0
  int64_t columns, plane;
};

// (dot >= threshold) xor flip, [rows, ceil(columns / 32)]
struct SignOutput {
  uint32_t* y;
  const int* threshold;
  const uint32_t* flip;
  int64_t columns;
};

}  // namespace quantkern::cuda
