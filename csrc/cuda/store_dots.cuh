// Stores dot products as the output wants them, from the lanes in which the kernels hold them.
#pragma once

#include "../numerics/binary.h"
#include "binary_output.cuh"

namespace quantkern::cuda {

constexpr int kFragmentColumns = 8;  // of 32 neighbouring columns those that one thread of a matrix product holds

// The column of 32 that thread 0 to 3 of a row holds as its i-th.
__device__ __forceinline__ constexpr int fragment_column(int thread, int i) { return i / 2 * 8 + thread * 2 + i % 2; }

// Where a row of the output begins.
__device__ __forceinline__ int64_t offset_of(const FloatOutput& out, int64_t row) {
  if (out.plane == 1) return row * out.columns;
  const int64_t image = row / out.plane;
  return image * out.plane * out.columns + (row - image * out.plane);
}
__device__ __forceinline__ int64_t offset_of(const SignOutput& out, int64_t row) { return row * words_of(out.columns); }

// Parameters of kColumns neighbouring columns, in shared memory.
template <class Output, int kColumns>
struct ColumnParameters;
template <int kColumns>
struct ColumnParameters<FloatOutput, kColumns> {
  float scale[kColumns], bias[kColumns];
  __device__ __forceinline__ void load(const FloatOutput& out, int64_t first, int i) {
    const bool inside = first + i < out.columns;
    scale[i] = inside && out.scale != nullptr ? out.scale[first + i] : 1.0f;
    bias[i] = inside && out.bias != nullptr ? out.bias[first + i] : 0.0f;
  }
};
template <int kColumns>
struct ColumnParameters<SignOutput, kColumns> {
  int threshold[kColumns];
  uint32_t flip[kColumns / kWordBits];
  __device__ __forceinline__ void load(const SignOutput& out, int64_t first, int i) {
    const int64_t column = first + i;
    threshold[i] = column < out.columns ? out.threshold[column] : 0;
    if (i % kWordBits == 0) flip[i / kWordBits] = column < out.columns ? out.flip[column / kWordBits] : 0;
  }
};

// The four threads of a row store its dot products with 32 columns: those from `at` on of the parameters, from
// `first` on of the output. inside: whether the row is one of the output. Called by whole warps.
template <int kColumns>
__device__ __forceinline__ void store_fragment(const FloatOutput& out,
                                               const ColumnParameters<FloatOutput, kColumns>& columns, int at,
                                               int64_t offset, int64_t first, int thread,
                                               const int (&dots)[kFragmentColumns], bool inside) {
  if (!inside) return;
  const bool pairs = out.plane == 1 && out.columns % 2 == 0;
#pragma unroll
  for (int i = 0; i < kFragmentColumns; i += 2) {
    const int64_t column = first + fragment_column(thread, i);
    // Without a scale the factor is 1, which changes nothing; a bias of 0 would turn -0 into 0.
    const float* bias = out.bias != nullptr ? columns.bias : nullptr;
    const int place = at + fragment_column(thread, i);
    const float2 values = {scaled_dot(dots[i], columns.scale, bias, place),
                           scaled_dot(dots[i + 1], columns.scale, bias, place + 1)};
    float* y = out.y + offset + column * out.plane;
    if (pairs && column < out.columns) {
      *reinterpret_cast<float2*>(y) = values;
    } else {
      if (column < out.columns) y[0] = values.x;
      if (column + 1 < out.columns) y[out.plane] = values.y;
    }
  }
}

template <int kColumns>
__device__ __forceinline__ void store_fragment(const SignOutput& out,
                                               const ColumnParameters<SignOutput, kColumns>& columns, int at,
                                               int64_t offset, int64_t first, int thread,
                                               const int (&dots)[kFragmentColumns], bool inside) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kFragmentColumns; ++i) {
    const int bit = fragment_column(thread, i);
    const bool plus = sign_of_dot(dots[i], columns.threshold[at + bit], columns.flip[at / kWordBits] >> bit & 1u);
    word |= (plus ? 1u : 0u) << bit;
  }
  word |= __shfl_xor_sync(0xffffffffu, word, 1);
  word |= __shfl_xor_sync(0xffffffffu, word, 2);
  if (inside && thread == 0 && first < out.columns) {
    out.y[offset + first / kWordBits] = word & bits_in_use(first / kWordBits, out.columns);
  }
}

// A whole warp stores a row's dot products with the 32 columns from `first` on, one a lane.
__device__ __forceinline__ void store_stretch(const FloatOutput& out, int64_t row, int64_t first, int lane, int dot) {
  const int64_t column = first + lane;
  if (column >= out.columns) return;
  out.y[offset_of(out, row) + column * out.plane] = scaled_dot(dot, out.scale, out.bias, column);
}

__device__ __forceinline__ void store_stretch(const SignOutput& out, int64_t row, int64_t first, int lane, int dot) {
  const int64_t column = first + lane, word = first / kWordBits;
  const bool plus = column < out.columns && sign_of_dot(dot, out.threshold[column], out.flip[word] >> lane & 1u);
  const uint32_t bits = __ballot_sync(0xffffffffu, plus);
  if (lane == 0) out.y[offset_of(out, row) + word] = bits;
}

}  // namespace quantkern::cuda
