// The kernels of binary_product.h, once per instruction set.
#include "binary_product.h"

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

#define QK_LANE static inline __attribute__((always_inline))

namespace quantkern::cpu {
namespace {

constexpr int64_t kTile = 96;  // columns of a block of sums

// Nibbles with an odd number of ones in a row of whole words.
int32_t count_odd_nibbles(const uint8_t* row, int64_t bytes) {
  int32_t odd = 0;
  for (int64_t k = 0; k < bytes; k += 4) {
    uint32_t word;
    std::memcpy(&word, row + k, 4);
    word ^= word >> 1;
    word ^= word >> 2;
    word &= 0x11111111u;
    odd += static_cast<int32_t>(word * 0x11111111u >> 28);  // the sum of the nibbles, at most 8
  }
  return odd;
}

}  // namespace
}  // namespace quantkern::cpu

namespace quantkern::cpu::baseline {
#include "binary_output.h"
#include "binary_product_generic.h"
}  // namespace quantkern::cpu::baseline

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
#define QK_AVX2
namespace quantkern::cpu::avx2 {
#include "binary_output.h"
#include "binary_product_avx2.h"
namespace counting {
#include "binary_product_generic.h"
}  // namespace counting
}  // namespace quantkern::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
namespace quantkern::cpu::avx512 {
#include "binary_output.h"
#include "binary_product_avx512.h"
}  // namespace quantkern::cpu::avx512
#undef QK_AVX2
#pragma GCC pop_options
#endif

namespace quantkern::cpu {

// Arranging weights costs as much as counting the differing bits of some rows.
constexpr int64_t kFewRows = 8;

const BinaryKernels& binary_kernels(int64_t rows, bool arranged) {
#if defined(__x86_64__)
  if (current_isa() == Isa::kAvx512 && has_vector_popcount()) return avx512::binary_kernels;
  if (current_isa() == Isa::kBaseline) return baseline::binary_kernels;
  return arranged || rows > kFewRows ? avx2::binary_kernels : avx2::counting::binary_kernels;
#else
  return (void)rows, (void)arranged, baseline::binary_kernels;
#endif
}

namespace {

// Bytes (8 rows) x (8 bytes of each) turned about their diagonal, by swapping halves, quarters and eighths.
void transpose_bytes(uint64_t (&rows)[8]) {
  constexpr uint64_t masks[] = {0x00000000ffffffffu, 0x0000ffff0000ffffu, 0x00ff00ff00ff00ffu};
  for (int step = 0, apart = 4; apart > 0; ++step, apart /= 2) {
    for (int i = 0; i < 8; ++i) {
      if (i & apart) continue;
      const uint64_t swapped = (rows[i] >> (8 * apart) ^ rows[i + apart]) & masks[step];
      rows[i + apart] ^= swapped;
      rows[i] ^= swapped << (8 * apart);
    }
  }
}

}  // namespace

void arrange_blocks(const uint8_t* weights, int64_t n, int64_t bytes, uint8_t* arranged, int64_t begin, int64_t end) {
  int32_t* odd = reinterpret_cast<int32_t*>(arranged + arranged_rows(n) * bytes);
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* out = arranged + block * kRowsTogether * bytes;
    for (int64_t j = 0; j < kRowsTogether; j += 8) {
      int64_t rows[8];
      for (int64_t i = 0; i < 8; ++i) rows[i] = block * kRowsTogether + ((j + i) >> 1) + 16 * (i & 1);
      for (int64_t k = 0; k < bytes; k += 8) {
        const int64_t width = bytes - k < 8 ? bytes - k : 8;
        uint64_t part[8] = {};
        for (int64_t i = 0; i < 8; ++i)
          if (rows[i] < n) std::memcpy(&part[i], weights + rows[i] * bytes + k, width);
        transpose_bytes(part);
        for (int64_t i = 0; i < width; ++i) std::memcpy(out + (k + i) * kRowsTogether + j, &part[i], 8);
      }
      for (int64_t row : rows) odd[row] = row < n ? count_odd_nibbles(weights + row * bytes, bytes) : 0;
    }
  }
}

}  // namespace quantkern::cpu
