// Signs of real numbers to packed words and back, and the number of ones in packed rows.
//
//   pack: bit i % 32 of word i / 32 of a row = 1 where x[i] >= 0;  unpack: y = 2 * bit - 1;  count: popcount of a row
//
// Layout: x is [outer, k, inner] as it lies in memory, packed [outer, inner, words] with words = ceil(k / 32), padding
// bits 0. With inner 1 the rows of x follow one another.
// Grid, all striding by the whole grid: pack_groups (inner 1, whole words) a thread for eight elements and their byte;
// pack_rows (inner 1, any k) a warp for eight words, a lane for an element; pack_columns (inner > 1) a thread for a
// word, neighbours on neighbouring columns; unpack a thread for eight elements; count a warp for a row.
// Bytes an element: reads x and writes 1/8 byte, 4.125 in float32 and 2.125 in 16 bits; unpack the same the other way;
// count reads 1/8 byte.
// Numerics: one comparison an element (numerics/binary.h), integers, exact.
#include "pack_signs.cuh"

#include <type_traits>

#include "../numerics/binary.h"
#include "reduce.cuh"

namespace quantkern::cuda {
namespace {

// Elements a thread loads before it looks at the first of them.
constexpr int kTogether = 8;

__device__ __forceinline__ int64_t global_warp() {
  return (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / kWarp;
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    pack_groups_kernel(const T* x, uint8_t* packed, int64_t numel, bool x_vectorizable) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index * kGroup < numel;
       index += stride) {
    const Group<T> group = load_group(x, index * kGroup, numel, x_vectorizable);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) bits |= (is_plus(to_float(group.lane[j])) ? 1u : 0u) << j;
    packed[index] = static_cast<uint8_t>(bits);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) pack_rows_kernel(const T* x, uint32_t* packed, int64_t rows, int64_t k) {
  const int lane = threadIdx.x % kWarp;
  const int64_t words = words_of(k), all = rows * words;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp) * kTogether;
  for (int64_t first = global_warp() * kTogether; first < all; first += stride) {
    int64_t row = first / words, word = first - row * words;
    bool plus[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int64_t column = word * kWordBits + lane;
      plus[j] = row < rows && column < k && is_plus(to_float(x[row * k + column]));
      if (++word == words) {
        word = 0;
        ++row;
      }
    }
    unsigned mine = 0;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const unsigned bits = __ballot_sync(0xffffffffu, plus[j]);
      if (lane == j) mine = bits;
    }
    if (lane < kTogether && first + lane < all) packed[first + lane] = mine;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) pack_columns_kernel(const T* x, uint32_t* packed, ChannelView view) {
  const int64_t words = words_of(view.channels), all = view.outer * words * view.inner;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index < all; index += stride) {
    const int64_t plane = index / view.inner, column = index - plane * view.inner;
    const int64_t outer = plane / words, word = plane - outer * words;
    const int64_t left = view.channels - word * kWordBits;
    const T* source = x + (outer * view.channels + word * kWordBits) * view.inner + column;
    uint32_t bits = 0;
#pragma unroll
    for (int first = 0; first < kWordBits; first += kTogether) {
      float values[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        values[j] = first + j < left ? to_float(source[(first + j) * view.inner]) : __builtin_nanf("");
#pragma unroll
      for (int j = 0; j < kTogether; ++j) bits |= (is_plus(values[j]) ? 1u : 0u) << (first + j);
    }
    packed[(outer * view.inner + column) * words + word] = bits;
  }
}

// kWholeWords: k is a multiple of 32, so that bit i of packed is element i of y. Else the row is followed element by
// element.
template <class T, bool kWholeWords>
__global__ void __launch_bounds__(kBlock)
    unpack_kernel(const uint32_t* packed, T* y, int64_t numel, int64_t k, int64_t words) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index * kGroup < numel;
       index += stride) {
    const int64_t begin = index * kGroup;
    unsigned bits = 0;
    if (kWholeWords) {
      bits = packed[begin / kWordBits] >> (begin % kWordBits);
    } else {
      int64_t row = begin / k, column = begin - row * k;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (begin + j < numel) bits |= (packed[row * words + column / kWordBits] >> (column % kWordBits) & 1u) << j;
        if (++column == k) {
          column = 0;
          ++row;
        }
      }
    }
    Group<T> group;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) group.lane[j] = from_float<T>(bits >> j & 1u ? 1.0f : -1.0f);
    store_group(y, begin, numel, true, group);
  }
}

__global__ void __launch_bounds__(kBlock)
    count_signs_kernel(const uint32_t* packed, int64_t rows, int64_t words, int* counts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kBlock / kWarp);
  for (int64_t row = global_warp(); row < rows; row += stride) {
    int ones = 0;
    for (int64_t word = lane; word < words; word += kWarp) ones += __popc(packed[row * words + word]);
    ones = warp_sum(ones);
    if (lane == 0) counts[row] = ones;
  }
}

template <class T>
cudaError_t launch_packing(const PackArguments& a, cudaStream_t stream) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t numel = a.view.numel();
  if (a.view.inner > 1) {
    // launch_over_groups gives a thread kGroup elements; here each of them is a word.
    const int64_t all = a.view.outer * words_of(a.view.channels) * a.view.inner;
    return launch_over_groups(pack_columns_kernel<T>, all * kGroup, stream, x, a.packed, a.view);
  }
  if (a.view.channels % kWordBits == 0) {
    return launch_over_groups(pack_groups_kernel<T>, numel, stream, x, reinterpret_cast<uint8_t*>(a.packed), numel,
                              is_vectorizable(x, 1, numel));
  }
  const int64_t all = a.view.outer * words_of(a.view.channels);
  return launch_over_groups(pack_rows_kernel<T>, all * kWarp, stream, x, a.packed, a.view.outer, a.view.channels);
}

}  // namespace

cudaError_t launch_pack_signs(const PackArguments& a, cudaStream_t stream) {
  if (a.view.numel() == 0) return cudaSuccess;
  return for_dtype(a.dtype,
                   [&](auto* type) { return launch_packing<std::remove_pointer_t<decltype(type)>>(a, stream); });
}

cudaError_t launch_unpack_signs(const UnpackArguments& a, cudaStream_t stream) {
  const int64_t numel = a.rows * a.k;
  if (numel == 0) return cudaSuccess;
  return for_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_over_groups(a.k % kWordBits == 0 ? unpack_kernel<T, true> : unpack_kernel<T, false>, numel, stream,
                              a.packed, static_cast<T*>(a.y), numel, a.k, words_of(a.k));
  });
}

cudaError_t launch_count_signs(const uint32_t* packed, int64_t rows, int64_t words, int* counts, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return launch_over_groups(count_signs_kernel, rows * kWarp * kGroup, stream, packed, rows, words, counts);
}

}  // namespace quantkern::cuda
