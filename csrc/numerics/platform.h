// How the numerics headers are seen by a host and by a device compiler. No torch, no CUDA headers.
#pragma once

#if defined(__CUDACC__)
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
// always_inline lets a caller compiled for a wider instruction set absorb these baseline definitions.
#define QK_HOST_DEVICE inline __attribute__((always_inline))
#else
#define QK_HOST_DEVICE inline
#endif
