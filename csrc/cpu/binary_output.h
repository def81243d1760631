// What becomes of a block of sums. Included once per instruction set inside its namespace; no include guard.

constexpr int64_t kTile = 96;  // columns of a block of sums

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

// Eight neighbouring rows of an image become eight neighbouring elements of each of its planes.
static void write_planes(const BinaryProduct& p, int64_t first, int64_t count, int64_t column, int64_t columns,
                         const int32_t* dots) {
  for (int64_t r = 0; r < count;) {
    const int64_t image = (first + r) / p.plane, at = (first + r) % p.plane;
    int64_t run = p.plane - at < count - r ? p.plane - at : count - r;
    if (run > 8) run = 8;
    const int32_t* sums = dots + r * kTile;
    float* out = p.values + (image * p.n + column) * p.plane + at;
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t k = 0; k < run; ++k)
        out[c * p.plane + k] = scaled_dot(sums[k * kTile + c], p.scale, p.bias, column + c);
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
