// Launchers of the products of packed rows.
#pragma once

#include "binary_output.cuh"

namespace quantkern::cuda {

struct BinaryMatmulArguments {
  const uint32_t *a, *b;  // [m, words], [n, words]
  int64_t m, n, k;
  const int* b_ones;  // the ones among the signs of each row of b; null: counted by the kernel
};

cudaError_t launch_binary_matmul(const BinaryMatmulArguments& arguments, const FloatOutput& output,
                                 cudaStream_t stream);
cudaError_t launch_binary_matmul(const BinaryMatmulArguments& arguments, const SignOutput& output, cudaStream_t stream);

}  // namespace quantkern::cuda
