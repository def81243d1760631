// Products of packed rows by counting differing bits, on any processor. Included inside a namespace; no include guard.
//
//   formula   dot = length - 2 * popcount(a xor b); padding bits are equal, they do not count
//   layout    rows as they are packed

static int64_t rows_together(const BinaryProduct&) { return 16; }

static bool prepare(const BinaryProduct& p, int64_t first, int64_t count, Scratch& scratch) {
  uint8_t* memory = scratch.get(count * p.bytes + count * kTile * sizeof(int32_t) + 64);
  if (!memory) return false;
  p.rows(p.source, first, count, memory + (count * kTile * sizeof(int32_t) + 63) / 64 * 64);
  return true;
}

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

static void columns(const BinaryProduct& p, int64_t first, int64_t count, int64_t begin, int64_t end,
                    Scratch& scratch) {
  int32_t* dots = reinterpret_cast<int32_t*>(scratch.get(0));
  const uint8_t* rows = scratch.get(0) + (count * kTile * sizeof(int32_t) + 63) / 64 * 64;
  for (int64_t column = begin; column < end; column += kTile) {
    const int64_t width = end - column < kTile ? end - column : kTile;
    for (int64_t c = 0; c < width; ++c)
      for (int64_t r = 0; r < count; ++r)
        dots[r * kTile + c] = static_cast<int32_t>(p.length) -
                              2 * differing(rows + r * p.bytes, p.weights + (column + c) * p.bytes, p.bytes);
    write_output(p, first, count, column, width, dots);
  }
}

static const BinaryKernels binary_kernels{false, kTile, rows_together, prepare, columns};
