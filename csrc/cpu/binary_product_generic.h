// Products of packed rows by counting differing bits, on any processor. Included inside a namespace; no include guard.
//
//   formula   dot = length - 2 * popcount(a xor b); padding bits are equal, they do not count
//   layout    rows as they are packed

static int64_t rows_together(const BinaryProduct&) { return 16; }

static int32_t differing(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int64_t i = 0;
  int32_t sum = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t x, y;
    std::memcpy(&x, a + i, 8);
    std::memcpy(&y, b + i, 8);
    sum += __builtin_popcountll(x ^ y);
  }
  for (; i < bytes; i += 4) {
    uint32_t x, y;
    std::memcpy(&x, a + i, 4);
    std::memcpy(&y, b + i, 4);
    sum += __builtin_popcount(x ^ y);
  }
  return sum;
}

static void sum_block(const BinaryProduct& p, const uint8_t* rows, int64_t count, int64_t column, int64_t width,
                      int32_t* dots) {
  for (int64_t c = 0; c < width; ++c)
    for (int64_t r = 0; r < count; ++r)
      dots[r * kTile + c] = static_cast<int32_t>(
          p.length - 2 * differing(rows + r * p.bytes, p.weights + (column + c) * p.bytes, p.bytes));
}

static void columns(const BinaryProduct& p, int64_t first, int64_t count, int64_t begin, int64_t end,
                    Scratch& scratch) {
  count_columns(p, first, count, begin, end, scratch, sum_block);
}

static const BinaryKernels binary_kernels{false, kTile, rows_together, fetch_rows, columns};
