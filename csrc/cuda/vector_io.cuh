// Groups of eight consecutive elements: 16-byte loads and stores, and what happens where these are not possible.
//
// A group that is misaligned or reaches over the end is read and written element by element. Lanes beyond the end
// read as NaN: ranges drop NaN and its gradient bit is 0, so no kernel needs a second loop for the tail.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../numerics/dtype.h"
#include "launch.cuh"

namespace quantkern::cuda {

constexpr int kVectorBytes = 16;

template <class T>
struct alignas(kVectorBytes) Group {
  T lane[kGroup];
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Whether every group of a row may be accessed 16 bytes at a time, where rows of `length` elements follow one
// another from `base`.
inline bool is_vectorizable(const void* base, int64_t rows, int64_t length) {
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 && (rows == 1 || length % kGroup == 0);
}

// The elements [begin, begin + 8) of a row of `length` elements.
template <class T>
__device__ __forceinline__ Group<T> load_group(const T* row, int64_t begin, int64_t length, bool vectorizable) {
  Group<T> group;
  if (vectorizable && begin + kGroup <= length) {
    const uint4* source = reinterpret_cast<const uint4*>(row + begin);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(group) / kVectorBytes); ++i) {
      reinterpret_cast<uint4*>(&group)[i] = source[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      group.lane[j] = begin + j < length ? row[begin + j] : from_float<T>(__builtin_nanf(""));
    }
  }
  return group;
}

template <class T>
__device__ __forceinline__ void store_group(T* row, int64_t begin, int64_t length, bool vectorizable,
                                            const Group<T>& group) {
  if (vectorizable && begin + kGroup <= length) {
    uint4* target = reinterpret_cast<uint4*>(row + begin);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(group) / kVectorBytes); ++i) {
      target[i] = reinterpret_cast<const uint4*>(&group)[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (begin + j < length) row[begin + j] = group.lane[j];
    }
  }
}

// Calls f(group, begin) for the groups of x that belong to this thread of the grid, and stores what it makes of each.
// y is aligned.
template <class T, class F>
__device__ __forceinline__ void map_groups(const T* x, T* y, int64_t numel, bool x_vectorizable, const F& f) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; index * kGroup < numel;
       index += stride) {
    const int64_t begin = index * kGroup;
    Group<T> group = load_group(x, begin, numel, x_vectorizable);
    f(group, begin);
    store_group(y, begin, numel, true, group);
  }
}

// The mask bits of a group that belong to elements; those beyond the end stay 0.
__device__ __forceinline__ unsigned element_bits(int64_t begin, int64_t numel) {
  return begin + kGroup <= numel ? 0xffu : (1u << (numel - begin)) - 1u;
}

// A group in another type.
template <class Y, class T>
__device__ __forceinline__ Group<Y> converted(const Group<T>& group) {
  if constexpr (std::is_same_v<T, Y>) {
    return group;
  } else {
    Group<Y> other;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) other.lane[j] = from_float<Y>(to_float(group.lane[j]));
    return other;
  }
}

// Calls f with a null pointer of the element type. Double has no CUDA kernels.
template <class F>
cudaError_t for_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat:
      return f(static_cast<float*>(nullptr));
    case DType::kHalf:
      return f(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls f with null pointers of x's and y's element types: the same, or a 16-bit type of y for float32.
template <class F>
cudaError_t for_dtype_pair(DType x, DType y, F f) {
  return for_dtype(x, [&](auto* of_x) {
    return for_dtype(y, [&](auto* of_y) {
      using T = std::remove_pointer_t<decltype(of_x)>;
      using Y = std::remove_pointer_t<decltype(of_y)>;
      if constexpr (std::is_same_v<T, Y> || std::is_same_v<T, float>)
        return f(of_x, of_y);
      else
        return cudaErrorInvalidValue;
    });
  });
}

// Calls f(x's type, y's type) for every pair that quantizing kernels know: the same, or a 16-bit type for float32.
template <class F>
cudaError_t for_dtype_pairs(F f) {
  for (const DType x : {DType::kFloat, DType::kHalf, DType::kBFloat16}) {
    for (const DType y : {DType::kFloat, DType::kHalf, DType::kBFloat16}) {
      if (x != y && x != DType::kFloat) continue;
      const cudaError_t error = for_dtype_pair(x, y, [&](auto* of_x, auto* of_y) { return f(x, y, of_x, of_y); });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace quantkern::cuda
