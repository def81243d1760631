// Signs on the CPU: one stretch of memory, one thread. Compiled once per instruction set.
//
//   formula   numerics/binary.h; the gradient of binarize passes where |x| <= 1
//   layout    binarize: elements in memory order. Packing: rows along memory, or columns of [k][inner], of which a
//             block of neighbours is packed side by side, so that memory is read as it lies
//   bytes     binarize reads and writes an element once and writes 1/8 byte of mask; packing reads it and writes 1/8
//   numerics  comparisons only

// Bit i: lane i is +1. NaN is not: nothing equals it.
template <class V>
QK_LANE uint32_t plus_bits(V value, V zero) {
  return equal_bits(max_lane(value, zero), value);
}

template <bool kStream, class T>
static void binarize_typed(const void* x_data, void* y_data, uint8_t* mask, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  const V zero = V::all(0), one = V::all(1), minus = V::all(-1);
  V value;
  for (int64_t i = begin; i < end; i += V::width) {
    const int64_t count = end - i < V::width ? end - i : V::width;
    const bool whole = count == V::width;
    whole ? load(x + i, value) : load_some(x + i, count, value);
    const V known = max_lane(value, minus);  // -1 for NaN
    const V sign = where_less(known, zero, minus, one);
    whole ? store<kStream>(y + i, sign) : store_some(y + i, count, sign);
    if (!mask) continue;
    const uint32_t inside = equal_bits(min_lane(magnitude(value), one), magnitude(value)) & ((1u << count) - 1u);
    mask[i / 8] = static_cast<uint8_t>(inside);
    if (count > 8) mask[i / 8 + 1] = static_cast<uint8_t>(inside >> 8);
  }
  if (kStream) stream_fence();
}

static void binarize(DType dtype, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end, bool streamed) {
  switch (dtype) {
    case DType::kFloat:
      return (streamed ? binarize_typed<true, float> : binarize_typed<false, float>)(x, y, mask, begin, end);
    case DType::kHalf:
      return (streamed ? binarize_typed<true, Half> : binarize_typed<false, Half>)(x, y, mask, begin, end);
    case DType::kBFloat16:
      return (streamed ? binarize_typed<true, BFloat16> : binarize_typed<false, BFloat16>)(x, y, mask, begin, end);
    case DType::kDouble:
      return binarize_typed<false, double>(x, y, mask, begin, end);
  }
}

template <class T>
QK_LANE uint32_t pack_word(const T* x, int64_t count) {
  using V = typename VecOf<T>::type;
  const V zero = V::all(0);
  V value;
  uint32_t word = 0;
  if (count >= kWordBits) {
    for (int k = 0; k < kWordBits; k += V::width) {
      load(x + k, value);
      word |= plus_bits(value, zero) << k;
    }
    return word;
  }
  for (int64_t k = 0; k < count; ++k) word |= static_cast<uint32_t>(is_plus(x[k])) << k;
  return word;
}

template <class T>
static void pack_rows_typed(const void* data, int64_t k, uint32_t* words, int64_t begin, int64_t end) {
  const int64_t per_row = words_of(k);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(data) + row * k;
    for (int64_t w = 0; w < per_row; ++w) words[row * per_row + w] = pack_word(x + w * kWordBits, k - w * kWordBits);
  }
}

// Up to kColumns neighbouring columns: one bit of each a step, so that memory is read along its rows. The processor
// does not foresee the jump to the next row, so the rows are long: the words of a plane of 56x56 fit in the first-level
// cache.
constexpr int64_t kColumns = 4096;
template <class T>
QK_LANE void pack_column_words(const T* x, int64_t inner, int64_t rows, int64_t columns, uint32_t* words) {
  for (int64_t c = 0; c < columns; ++c) words[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * inner;
    for (int64_t c = 0; c < columns; ++c) words[c] |= static_cast<uint32_t>(is_plus(row[c])) << r;
  }
}

template <class T>
static void pack_columns_typed(const void* data, int64_t k, int64_t inner, uint32_t* words, int64_t begin,
                               int64_t end) {
  const int64_t per_row = words_of(k);
  const int64_t pieces = (inner + kColumns - 1) / kColumns, together = (inner + pieces - 1) / pieces;
  uint32_t block[kColumns];
  for (int64_t i = begin; i < end;) {
    const int64_t outer = i / inner, column = i % inner;
    int64_t count = inner - column < end - i ? inner - column : end - i;
    if (count > together) count = together;
    for (int64_t w = 0; w < per_row; ++w) {
      const T* x = static_cast<const T*>(data) + (outer * k + w * kWordBits) * inner + column;
      const int64_t rows = k - w * kWordBits < kWordBits ? k - w * kWordBits : kWordBits;
      pack_column_words(x, inner, rows, count, block);
      for (int64_t c = 0; c < count; ++c) words[(i + c) * per_row + w] = block[c];
    }
    i += count;
  }
}

// The bits of +1 with the sign bit set where the packed bit is 0.
template <class E, E kOne, E kSign>
static void unpack_typed(const uint32_t* words, int64_t k, void* data, int64_t begin, int64_t end) {
  const int64_t per_row = words_of(k);
  for (int64_t row = begin; row < end; ++row) {
    E* y = static_cast<E*>(data) + row * k;
    for (int64_t w = 0; w < per_row; ++w) {
      const uint32_t word = ~words[row * per_row + w];
      const int64_t count = k - w * kWordBits;
      E* out = y + w * kWordBits;
      if (count >= kWordBits) {
        for (int i = 0; i < kWordBits; ++i) out[i] = static_cast<E>(kOne | static_cast<E>(word >> i & 1u) * kSign);
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<E>(kOne | static_cast<E>(word >> i & 1u) * kSign);
      }
    }
  }
}

static void pack_rows(DType dtype, const void* x, int64_t k, uint32_t* words, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat:
      return pack_rows_typed<float>(x, k, words, begin, end);
    case DType::kHalf:
      return pack_rows_typed<Half>(x, k, words, begin, end);
    case DType::kBFloat16:
      return pack_rows_typed<BFloat16>(x, k, words, begin, end);
    case DType::kDouble:
      return pack_rows_typed<double>(x, k, words, begin, end);
  }
}

static void pack_columns(DType dtype, const void* x, int64_t k, int64_t inner, uint32_t* words, int64_t begin,
                         int64_t end) {
  switch (dtype) {
    case DType::kFloat:
      return pack_columns_typed<float>(x, k, inner, words, begin, end);
    case DType::kHalf:
      return pack_columns_typed<Half>(x, k, inner, words, begin, end);
    case DType::kBFloat16:
      return pack_columns_typed<BFloat16>(x, k, inner, words, begin, end);
    case DType::kDouble:
      return pack_columns_typed<double>(x, k, inner, words, begin, end);
  }
}

static void unpack(DType dtype, const uint32_t* words, int64_t k, void* y, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kFloat:
      return unpack_typed<uint32_t, 0x3f800000u, 0x80000000u>(words, k, y, begin, end);
    case DType::kHalf:
      return unpack_typed<uint16_t, 0x3c00u, 0x8000u>(words, k, y, begin, end);
    case DType::kBFloat16:
      return unpack_typed<uint16_t, 0x3f80u, 0x8000u>(words, k, y, begin, end);
    case DType::kDouble:
      return unpack_typed<uint64_t, 0x3ff0000000000000u, 0x8000000000000000u>(words, k, y, begin, end);
  }
}

static const SignLoops sign_loops{binarize, pack_rows, pack_columns, unpack};
