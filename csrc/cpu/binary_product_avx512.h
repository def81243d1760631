// Products of packed rows by counting differing bits, 512 at a time (VPOPCNTDQ). Included inside the avx512 namespace;
// no include guard.
//
//   formula   dot = length - 2 * popcount(a xor b); padding bits are equal, they do not count
//   layout    rows as they are packed; 4 left rows x 4 weight rows share their loads

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,f16c,prefer-vector-width=512")

constexpr int64_t kSide = 4;

static int64_t rows_together(const BinaryProduct&) { return 32; }

// Up to kSide x kSide sums; the rows behind the last one repeat it.
static void differing(const uint8_t* const (&a)[kSide], const uint8_t* const (&b)[kSide], int64_t bytes,
                      int64_t (&out)[kSide][kSide]) {
  __m512i sum[kSide][kSide];
  for (auto& row : sum)
    for (auto& each : row) each = _mm512_setzero_si512();
  for (int64_t k = 0; k < bytes; k += 64) {
    const __mmask64 some = bytes - k >= 64 ? ~__mmask64{0} : (__mmask64{1} << (bytes - k)) - 1;
    __m512i left[kSide], right[kSide];
    for (int i = 0; i < kSide; ++i) left[i] = _mm512_maskz_loadu_epi8(some, a[i] + k);
    for (int i = 0; i < kSide; ++i) right[i] = _mm512_maskz_loadu_epi8(some, b[i] + k);
    for (int r = 0; r < kSide; ++r)
      for (int c = 0; c < kSide; ++c)
        sum[r][c] = _mm512_add_epi64(sum[r][c], _mm512_popcnt_epi64(_mm512_xor_si512(left[r], right[c])));
  }
  for (int r = 0; r < kSide; ++r)
    for (int c = 0; c < kSide; ++c) out[r][c] = _mm512_reduce_add_epi64(sum[r][c]);
}

static void sum_block(const BinaryProduct& p, const uint8_t* rows, int64_t count, int64_t column, int64_t width,
                      int32_t* dots) {
  for (int64_t c = 0; c < width; c += kSide) {
    for (int64_t r = 0; r < count; r += kSide) {
      const uint8_t *a[kSide], *b[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        a[i] = rows + (r + i < count ? r + i : count - 1) * p.bytes;
        b[i] = p.weights + (column + (c + i < width ? c + i : width - 1)) * p.bytes;
      }
      int64_t sums[kSide][kSide];
      differing(a, b, p.bytes, sums);
      for (int64_t i = 0; i < kSide && r + i < count; ++i)
        for (int64_t j = 0; j < kSide && c + j < width; ++j)
          dots[(r + i) * kTile + c + j] = static_cast<int32_t>(p.length - 2 * sums[i][j]);
    }
  }
}

static void columns(const BinaryProduct& p, int64_t first, int64_t count, int64_t begin, int64_t end,
                    Scratch& scratch) {
  count_columns(p, first, count, begin, end, scratch, sum_block);
}

#pragma GCC pop_options

static const BinaryKernels binary_kernels{false, kTile, rows_together, fetch_rows, columns};
