// Eight float32 lanes in one AVX2 register. Included after vec_generic.h's Lanes inside the avx2 namespace.

struct Vec8 {
  static constexpr int width = 8;
  __m256 v;
  QK_LANE Vec8 all(float value) { return {_mm256_set1_ps(value)}; }
};

QK_LANE Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
QK_LANE Vec8 operator-(Vec8 a, Vec8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
QK_LANE Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
QK_LANE Vec8 operator/(Vec8 a, Vec8 b) { return {_mm256_div_ps(a.v, b.v)}; }
QK_LANE Vec8 where_less(Vec8 a, Vec8 b, Vec8 yes, Vec8 no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
QK_LANE Vec8 constant(Vec8, float value) { return Vec8::all(value); }
QK_LANE Vec8 magnitude(Vec8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
QK_LANE Vec8 with_sign_of(Vec8 a, Vec8 b) { return {_mm256_or_ps(a.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), b.v))}; }
QK_LANE Vec8 power_of_two(Vec8 n) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
QK_LANE Vec8 min_lane(Vec8 a, Vec8 b) { return {_mm256_min_ps(a.v, b.v)}; }
QK_LANE Vec8 max_lane(Vec8 a, Vec8 b) { return {_mm256_max_ps(a.v, b.v)}; }
QK_LANE Vec8 round_even(Vec8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
QK_LANE Vec8 multiply_as_float(Vec8 a, Vec8 b) { return a * b; }
QK_LANE uint32_t equal_bits(Vec8 a, Vec8 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
QK_LANE uint32_t less_bits(Vec8 a, Vec8 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
QK_LANE void load(const uint8_t* p, Vec8& r) {
  r.v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
QK_LANE void store_bytes(uint8_t* p, Vec8 a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
QK_LANE void store_block(uint8_t* p, const Vec8 (&a)[4]) {
  // Packing works on halves of registers: the last step puts their quarters in order.
  const __m256i low = _mm256_packs_epi32(_mm256_cvtps_epi32(a[0].v), _mm256_cvtps_epi32(a[1].v));
  const __m256i high = _mm256_packs_epi32(_mm256_cvtps_epi32(a[2].v), _mm256_cvtps_epi32(a[3].v));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
}

QK_LANE void load(const float* p, Vec8& r) { r.v = _mm256_loadu_ps(p); }
QK_LANE void load(const Half* p, Vec8& r) {
  r.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
QK_LANE void load(const BFloat16* p, Vec8& r) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  r.v = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
template <bool kStream>
QK_LANE void write(void* p, __m256i bits) {
  kStream ? _mm256_stream_si256(static_cast<__m256i*>(p), bits) : _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
}
template <bool kStream>
QK_LANE void write(void* p, __m128i bits) {
  kStream ? _mm_stream_si128(static_cast<__m128i*>(p), bits) : _mm_storeu_si128(static_cast<__m128i*>(p), bits);
}

template <bool kStream = false>
QK_LANE void store(float* p, Vec8 a) {
  write<kStream>(p, _mm256_castps_si256(a.v));
}
template <bool kStream = false>
QK_LANE void store(Half* p, Vec8 a) {
  write<kStream>(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
template <bool kStream = false>
QK_LANE void store(BFloat16* p, Vec8 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  write<kStream>(p, _mm256_castsi256_si128(packed));
}

// Each lane keeps its own bit of the broadcast mask byte(s) and compares it with that bit.
template <bool kStream>
QK_LANE void select_group(const uint32_t* grad, const uint8_t* mask, uint32_t* out) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i own = _mm256_and_si256(_mm256_set1_epi32(mask[0]), bit);
  const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(grad));
  const __m256i kept = _mm256_and_si256(value, _mm256_cmpeq_epi32(own, bit));
  write<kStream>(out, kept);
}
template <bool kStream>
QK_LANE void select_group(const uint16_t* grad, const uint8_t* mask, uint16_t* out) {
  const __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                        static_cast<short>(32768));
  const __m256i own = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(mask[0] | mask[1] << 8)), bit);
  const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(grad));
  const __m256i kept = _mm256_and_si256(value, _mm256_cmpeq_epi16(own, bit));
  write<kStream>(out, kept);
}
template <>
struct SelectWidth<uint16_t> {
  static constexpr int value = 16;
};
