// The kernels of binary_product.h, once per instruction set.
#include "binary_product.h"

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

#define QK_LANE static inline __attribute__((always_inline))

namespace quantkern::cpu::baseline {
#include "binary_output.h"
#include "binary_product_generic.h"
}  // namespace quantkern::cpu::baseline

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
namespace quantkern::cpu::avx2 {
#include "binary_output.h"
#include "binary_product_avx2.h"
}  // namespace quantkern::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
namespace quantkern::cpu::avx512 {
#include "binary_output.h"
#include "binary_product_avx512.h"
}  // namespace quantkern::cpu::avx512
#pragma GCC pop_options
#endif

namespace quantkern::cpu {

const BinaryKernels& binary_kernels() {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512 && has_vector_popcount()) return avx512::binary_kernels;
  return current_isa() == Isa::kBaseline ? baseline::binary_kernels : avx2::binary_kernels;
#else
  return baseline::binary_kernels;
#endif
}

void arrange_blocks(const uint8_t* weights, int64_t n, int64_t bytes, uint8_t* arranged, int64_t begin, int64_t end) {
  int32_t* odd = reinterpret_cast<int32_t*>(arranged + arranged_rows(n) * bytes);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t j = 0; j < kRowsTogether; ++j) {
      const int64_t row = block * kRowsTogether + (j >> 1) + 16 * (j & 1);
      uint8_t* out = arranged + block * kRowsTogether * bytes + j;
      const uint8_t* in = weights + row * bytes;
      uint32_t odd_nibbles = 0;
      for (int64_t k = 0; k < bytes; ++k) {
        const unsigned value = row < n ? in[k] : 0u, folded = value ^ value >> 1;
        odd_nibbles += ((folded ^ folded >> 2) & 1u) + ((folded >> 4 ^ folded >> 6) & 1u);
        out[k * kRowsTogether] = static_cast<uint8_t>(value);
      }
      odd[row] = static_cast<int32_t>(odd_nibbles);
    }
  }
}

}  // namespace quantkern::cpu
