// Blocks of 8 rows x 8 columns of sums turned about their diagonal, 256 bits wide. Included by binary_output.h.

// transposed[i] lane j is rows[j] lane i.
QK_LANE void transpose(const __m256 (&rows)[8], __m256 (&transposed)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      fours[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0x44);
      fours[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    transposed[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    transposed[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

static void write_block(const BinaryProduct& p, const int32_t* sums, int64_t column, float* out) {
  __m256 rows[8], planes[8];
  for (int r = 0; r < 8; ++r)
    rows[r] = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums + r * kTile)));
  transpose(rows, planes);
  for (int c = 0; c < 8; ++c) {
    __m256 value = planes[c];
    if (p.scale) value = _mm256_mul_ps(value, _mm256_set1_ps(p.scale[column + c]));
    if (p.bias) value = _mm256_add_ps(value, _mm256_set1_ps(p.bias[column + c]));
    _mm256_storeu_ps(out + c * p.plane, value);
  }
}

static void write_run(const BinaryProduct& p, const int32_t* sums, int64_t run, int64_t column, int64_t columns,
                      float* out) {
  const int64_t whole = reinterpret_cast<uintptr_t>(sums) % 32 == 0 ? run / 8 * 8 : 0;
  for (int64_t c = 0; c < columns; c += 8) {
    const int64_t width = columns - c < 8 ? columns - c : 8, done = width == 8 ? whole : 0;
    for (int64_t r = 0; r < done; r += 8) write_block(p, sums + r * kTile + c, column + c, out + c * p.plane + r);
    write_run_of(p, sums + c, done, run, column + c, width, out + c * p.plane);
  }
}
