// The instructions C++ has no words for: asynchronous copies into shared memory, matrix loads and matrix products.
//
// All but the copies are done by a whole warp together. The matrices of a product lie in its lanes as the
// instructions want them; with g = lane / 4 and t = lane % 4, lane holds
//   of a [16 rows][8 words]: a[0] is row g, word t; a[1] row g + 8, word t; a[2] and a[3] the same rows, word t + 4
//   of b [8 columns][8 words]: b[0] is column g, word t; b[1] column g, word t + 4
//   of the sums [16 rows][8 columns]: sums[2 h + e] is row g + 8 h, column 2 t + e
#pragma once

#include <cstdint>

#include "launch.cuh"

#if !defined(__CUDACC__)
#include <emulated_instructions.h>  // of the tests that run kernels on the processor
#else

namespace quantkern::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "quantkern's binary kernels need sm_80 or newer; leave older architectures out of TORCH_CUDA_ARCH_LIST"
#endif

// Whether products of bits run on the tensor cores. Where they are emulated, products of bytes are much faster.
__device__ __forceinline__ bool has_bit_products() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return false;
#else
  return true;
#endif
}

// threadIdx.x, read anew: what is computed from it is not kept in registers from one tile to the next.
__device__ __forceinline__ int fresh_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Starts to copy kBytes, 4 or 16, or to write as many zeros where they are not wanted; global is then not read.
template <int kBytes>
__device__ __forceinline__ void start_copy(void* shared, const void* global, bool wanted) {
  static_assert(kBytes == 4 || kBytes == 16);
  const int read = wanted ? kBytes : 0;
  if (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(read)
                 : "memory");
  }
}

// Everything this thread started since the last call is one batch, empty ones count.
__device__ __forceinline__ void end_batch() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until all of this thread's batches but the newest kBatches have arrived; other threads see them after a barrier.
template <int kBatches>
__device__ __forceinline__ void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kBatches) : "memory");
}

// Four matrices of 8 rows of 16 bytes in shared memory: lane i gives the address of row i % 8 of matrix i / 8 and
// receives word lane % 4 of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(const void* row, unsigned& first, unsigned& second, unsigned& third,
                                              unsigned& fourth) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(first), "=r"(second), "=r"(third), "=r"(fourth)
               : "r"(shared_address(row))
               : "memory");
}

// sums += popcount(a and b), over 256 bits
__device__ __forceinline__ void multiply_bits(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sums += a * b, over 32 unsigned bytes, four a word
__device__ __forceinline__ void multiply_bytes(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace quantkern::cuda

#endif
