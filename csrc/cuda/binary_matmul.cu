// Products of packed rows: [m, k] x [n, k] -> [m, n].
//
//   dot[m, n] = k - 2 popcount(a[m] xor b[n]) = k - 2 popcount(a[m]) - 2 popcount(b[n]) + 4 popcount(a[m] and b[n])
//   y = dot * scale[n] + bias[n], or the packed signs (dot >= threshold[n]) xor flip[n]
//
// Layout: a and b are packed along k, padding bits of any value; y is [m, n], signs [m, ceil(n / 32)].
// Grid: with few rows of a (kFewRows) a block owns 32 columns, each of its warps four of them, and goes through their
// words 16 bytes a lane; b is then read once, and xor and popcount are faster than the reading. With more rows a block
// owns a tile of rows and columns (binary_tile.cuh) and the tensor cores multiply. Both stride by the whole grid.
// Bytes an element: with few rows 1/8 of b, all that matters; tiles read 1/8 of a for each 64 or 128 columns, the same
// of b for rows, and write 4 or 1/8 byte an element of y.
// Numerics: the sums are integers and exact; then one float32 product and one sum (numerics/binary.h), no contraction.
#include "binary_matmul.cuh"

#include "binary_tile.cuh"
#include "reduce.cuh"

namespace quantkern::cuda {
namespace {

constexpr int kFewRows = 8;  // a warp for each in the end
constexpr int kColumnsOfWarp = kWarp / (kBlock / kWarp);
static_assert(kFewRows * kWarp <= kBlock);

// Chunk number `chunk` of a row; zeros beyond its end and in padding bits.
__device__ __forceinline__ uint4 load_chunk(const MatrixRows& matrix, int64_t row, int chunk, bool chunked) {
  const uint32_t* words = matrix.words + row * matrix.row_words;
  const int first = chunk * kChunkWords, left = matrix.row_words - first;
  uint4 read = {0, 0, 0, 0};
  if (chunked) {
    read = *reinterpret_cast<const uint4*>(words + first);
  } else {
    read.x = words[first];
    if (left > 1) read.y = words[first + 1];
    if (left > 2) read.z = words[first + 2];
    if (left > 3) read.w = words[first + 3];
  }
  if (left > kChunkWords) return read;
  if (left == 1) read.x &= matrix.last_bits;
  if (left == 2) read.y &= matrix.last_bits;
  if (left == 3) read.z &= matrix.last_bits;
  if (left == 4) read.w &= matrix.last_bits;
  return read;
}

__device__ __forceinline__ int count_differing(const uint4& a, const uint4& b) {
  return __popc(a.x ^ b.x) + __popc(a.y ^ b.y) + __popc(a.z ^ b.z) + __popc(a.w ^ b.w);
}

// This lane's share of the bits in which the rows of a differ from the columns from `first` on.
template <int kMost>
__device__ __forceinline__ void count_differing(int (&differing)[kColumnsOfWarp][kMost], const MatrixRows& a,
                                                const MatrixRows& b, int64_t first, bool chunked) {
  const int chunks = (a.row_words + kChunkWords - 1) / kChunkWords;
  for (int chunk = threadIdx.x % kWarp; chunk < chunks; chunk += kWarp) {
    uint4 columns[kColumnsOfWarp];
#pragma unroll
    for (int i = 0; i < kColumnsOfWarp; ++i) {
      const int64_t column = first + i < b.rows ? first + i : b.rows - 1;
      columns[i] = load_chunk(b, column, chunk, chunked);
    }
#pragma unroll
    for (int row = 0; row < kMost; ++row) {
      if (row >= a.rows) break;
      const uint4 words = load_chunk(a, row, chunk, chunked);
#pragma unroll
      for (int i = 0; i < kColumnsOfWarp; ++i) differing[i][row] += count_differing(words, columns[i]);
    }
  }
}

template <int kMost, class Output>
__global__ void __launch_bounds__(kBlock) few_rows_kernel(MatrixRows a, MatrixRows b, Output output, bool chunked) {
  __shared__ int dots[kMost][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp; first < b.rows;
       first += static_cast<int64_t>(gridDim.x) * kWarp) {
    int differing[kColumnsOfWarp][kMost] = {};
    count_differing(differing, a, b, first + warp * kColumnsOfWarp, chunked);
#pragma unroll
    for (int i = 0; i < kColumnsOfWarp; ++i) {
#pragma unroll
      for (int row = 0; row < kMost; ++row) {
        const int sum = warp_sum(differing[i][row]);
        if (lane == 0) dots[row][warp * kColumnsOfWarp + i] = a.row_signs - 2 * sum;
      }
    }
    __syncthreads();
    if (warp < kMost && warp < a.rows) store_stretch(output, warp, first, lane, dots[warp][lane]);
    __syncthreads();
  }
}

template <class Tile, int kVector, class Output>
__global__ void __launch_bounds__(kBlock, kTilesTogether)
    matmul_tiles_kernel(MatrixRows a, MatrixRows b, const int* b_ones, Output output, int64_t tiles_m,
                        int64_t tiles_n) {
  multiply_tiles<Tile, kVector>(a, b, b_ones, output, tiles_m, tiles_n);
}

template <class Output>
cudaError_t launch_few_rows(const MatrixRows& a, const MatrixRows& b, const Output& output, bool chunked,
                            cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(multiprocessors);
  if (error != cudaSuccess) return error;
  const int64_t blocks =
      std::min<int64_t>(ceil_div(b.rows, kWarp), static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor);
  return launch(a.rows == 1 ? few_rows_kernel<1, Output> : few_rows_kernel<kFewRows, Output>, blocks, kBlock, stream, a,
                b, output, chunked);
}

// The one place that chooses a kernel for a shape.
template <class Output>
cudaError_t launch_product(const BinaryMatmulArguments& arguments, const Output& output, cudaStream_t stream) {
  if (arguments.m == 0 || arguments.n == 0) return cudaSuccess;
  const MatrixRows a = matrix_rows(arguments.a, arguments.m, 1, arguments.k);
  const MatrixRows b = matrix_rows(arguments.b, arguments.n, 1, arguments.k);
  const bool chunked = is_chunked(a.words, a.period) && is_chunked(b.words, b.period);
  if (a.rows <= kFewRows) return launch_few_rows(a, b, output, chunked, stream);
  return for_tile(a.rows, b.rows, chunked, [&](auto tile, auto width, int multiprocessors) {
    using Shape = decltype(tile);
    return launch_tiles<Shape>(matmul_tiles_kernel<Shape, decltype(width)::value, Output>, a.rows, b.rows,
                               multiprocessors, stream, a, b, arguments.b_ones, output);
  });
}

}  // namespace

cudaError_t launch_binary_matmul(const BinaryMatmulArguments& arguments, const FloatOutput& output,
                                 cudaStream_t stream) {
  return launch_product(arguments, output, stream);
}

cudaError_t launch_binary_matmul(const BinaryMatmulArguments& arguments, const SignOutput& output,
                                 cudaStream_t stream) {
  return launch_product(arguments, output, stream);
}

}  // namespace quantkern::cuda
