// The product of packed rows: what is multiplied, what becomes of the sums, and the kernels of each instruction set.
// No torch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../numerics/binary.h"

namespace quantkern::cpu {

// Weights are arranged so many rows together: byte j of a block is that of row (j >> 1) + 16 * (j & 1).
constexpr int64_t kRowsTogether = 32;
constexpr int64_t arranged_rows(int64_t n) { return (n + kRowsTogether - 1) / kRowsTogether * kRowsTogether; }
// The bytes of all rows, and for every row the number of nibbles with an odd number of ones (int32).
constexpr int64_t arranged_bytes(int64_t n, int64_t row_bytes) { return arranged_rows(n) * (row_bytes + 4); }

struct BinaryProduct {
  int64_t m, n;
  int64_t bytes;   // of a row, a multiple of 4
  int64_t length;  // signs in a row that are not padding

  // The left rows, written one behind the other: they may have to be gathered.
  const void* source;
  void (*rows)(const void* source, int64_t first, int64_t count, uint8_t* out);
  // Adds to the sums of some rows what padding of images must not take part in; may be null.
  void (*correct)(const void* source, int64_t first, int64_t count, int64_t column, int64_t columns, int32_t* dots,
                  int64_t stride);

  const uint8_t* weights;   // [n][bytes]
  const uint8_t* arranged;  // null unless the kernels want it

  // Values: [m][n], or with plane > 0 [m / plane][n][plane]. Signs: [m][words_of(n)].
  const float *scale, *bias;
  float* values;
  int64_t plane;
  const int32_t* threshold;
  const uint32_t* flip;
  uint32_t* signs;
};

// What a thread works in, kept from item to item.
class Scratch {
 public:
  // 64-byte aligned, at least `bytes` long; the contents are lost.
  uint8_t* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      size_ = memory_ ? bytes : 0;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t size_ = 0;
};

struct BinaryKernels {
  bool wants_arranged;
  int64_t columns_together;  // items begin at multiples of it
  int64_t (*rows_together)(const BinaryProduct& p);
  // Fetches the rows [first, first + count) into scratch, in the form that `columns` reads.
  bool (*prepare)(const BinaryProduct& p, int64_t first, int64_t count, Scratch& scratch);
  // The sums of those rows with the weights [begin, end), and their output.
  void (*columns)(const BinaryProduct& p, int64_t first, int64_t count, int64_t begin, int64_t end, Scratch& scratch);
};

// rows: on the left. arranged: the weights are there in arranged order.
const BinaryKernels& binary_kernels(int64_t rows, bool arranged);

// Rows of weights [n][bytes] in arranged order: blocks [begin, end) of kRowsTogether rows.
void arrange_blocks(const uint8_t* weights, int64_t n, int64_t bytes, uint8_t* arranged, int64_t begin, int64_t end);

}  // namespace quantkern::cpu
