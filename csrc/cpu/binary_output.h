// What becomes of a block of sums. Included once per instruction set inside its namespace; no include guard.

// The sums of some rows with some columns, one plane of the output a column: [r][kTile] to [c][plane].
static void write_run_of(const BinaryProduct& p, const int32_t* sums, int64_t from, int64_t to, int64_t column,
                         int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = from; r < to; ++r)
      out[c * p.plane + r] = scaled_dot(sums[r * kTile + c], p.scale, p.bias, column + c);
}

#if defined(QK_AVX2)
#include "binary_planes_avx2.h"
#else
static void write_run(const BinaryProduct& p, const int32_t* sums, int64_t run, int64_t column, int64_t columns,
                      float* out) {
  write_run_of(p, sums, 0, run, column, columns, out);
}
#endif

static void write_rows(const BinaryProduct& p, int64_t first, int64_t count, int64_t column, int64_t columns,
                       const int32_t* dots) {
  for (int64_t r = 0; r < count; ++r) {
    const int32_t* sums = dots + r * kTile;
    float* out = p.values + (first + r) * p.n + column;
    if (!p.scale && !p.bias) {
      for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<float>(sums[c]);
    } else {
      for (int64_t c = 0; c < columns; ++c) out[c] = scaled_dot(sums[c], p.scale, p.bias, column + c);
    }
  }
}

// Neighbouring rows of an image become neighbouring elements of each of its planes: kOutputRows of them fill a line of
// the cache. write_run is the instruction set's own.
static void write_planes(const BinaryProduct& p, int64_t first, int64_t count, int64_t column, int64_t columns,
                         const int32_t* dots) {
  for (int64_t r = 0; r < count;) {
    const int64_t image = (first + r) / p.plane, at = (first + r) % p.plane;
    const int64_t run = p.plane - at < count - r ? p.plane - at : count - r;
    write_run(p, dots + r * kTile, run, column, columns, p.values + (image * p.n + column) * p.plane + at);
    r += run;
  }
}

static void write_signs(const BinaryProduct& p, int64_t first, int64_t count, int64_t column, int64_t columns,
                        const int32_t* dots) {
  for (int64_t r = 0; r < count; ++r) {
    const int32_t* sums = dots + r * kTile;
    uint32_t* out = p.signs + (first + r) * words_of(p.n) + column / kWordBits;
    for (int64_t c = 0; c < columns; c += kWordBits) {
      const int64_t width = columns - c < kWordBits ? columns - c : kWordBits;
      const int32_t* at = p.threshold + column + c;
      uint32_t word = 0;
      for (int64_t i = 0; i < width; ++i) word |= static_cast<uint32_t>(sums[c + i] >= at[i]) << i;
      out[c / kWordBits] = (word ^ p.flip[(column + c) / kWordBits]) & bits_in_use(0, width);
    }
  }
}

static void write_output(const BinaryProduct& p, int64_t first, int64_t count, int64_t column, int64_t columns,
                         int32_t* dots) {
  if (p.correct) p.correct(p.source, first, count, column, columns, dots, kTile);
  if (p.signs) return write_signs(p, first, count, column, columns, dots);
  p.plane ? write_planes(p, first, count, column, columns, dots) : write_rows(p, first, count, column, columns, dots);
}

// Kernels that count bits: the left rows as they are, behind the sums of one block of columns.
static size_t sums_bytes(int64_t count) { return (count * kTile * sizeof(int32_t) + 63) / 64 * 64; }

static bool fetch_rows(const BinaryProduct& p, int64_t first, int64_t count, Scratch& scratch) {
  uint8_t* memory = scratch.get(sums_bytes(count) + count * p.bytes + 64);
  if (!memory) return false;
  p.rows(p.source, first, count, memory + sums_bytes(count));
  return true;
}

// sum_block(p, rows, count, column, columns, dots) for every block of columns, and its output.
template <class SumBlock>
static void count_columns(const BinaryProduct& p, int64_t first, int64_t count, int64_t begin, int64_t end,
                          Scratch& scratch, const SumBlock& sum_block) {
  int32_t* dots = reinterpret_cast<int32_t*>(scratch.get(0));
  const uint8_t* rows = scratch.get(0) + sums_bytes(count);
  for (int64_t column = begin; column < end; column += kTile) {
    const int64_t width = end - column < kTile ? end - column : kTile;
    sum_block(p, rows, count, column, width, dots);
    write_output(p, first, count, column, width, dots);
  }
}
