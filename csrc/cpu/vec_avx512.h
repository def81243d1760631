// Sixteen float32 lanes in one AVX-512 register (F, BW, VL, DQ). Included after vec_generic.h's Lanes inside the
// avx512 namespace.

struct Vec16 {
  static constexpr int width = 16;
  __m512 v;
  QK_LANE Vec16 all(float value) { return {_mm512_set1_ps(value)}; }
};

QK_LANE Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
QK_LANE Vec16 operator-(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
QK_LANE Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
QK_LANE Vec16 operator/(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
QK_LANE Vec16 where_less(Vec16 a, Vec16 b, Vec16 yes, Vec16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
QK_LANE Vec16 constant(Vec16, float value) { return Vec16::all(value); }
QK_LANE Vec16 magnitude(Vec16 a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
QK_LANE Vec16 with_sign_of(Vec16 a, Vec16 b) { return {_mm512_or_ps(a.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), b.v))}; }
QK_LANE Vec16 power_of_two(Vec16 n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
QK_LANE Vec16 min_lane(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }
QK_LANE Vec16 max_lane(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
QK_LANE Vec16 round_even(Vec16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
QK_LANE Vec16 multiply_as_float(Vec16 a, Vec16 b) { return a * b; }
QK_LANE uint32_t equal_bits(Vec16 a, Vec16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
QK_LANE uint32_t less_bits(Vec16 a, Vec16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
QK_LANE void load(const uint8_t* p, Vec16& r) {
  r.v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
QK_LANE void store_bytes(uint8_t* p, Vec16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
QK_LANE void store_block(uint8_t* p, const Vec16 (&a)[2]) {
  store_bytes(p, a[0]);
  store_bytes(p + 16, a[1]);
}

QK_LANE void load(const float* p, Vec16& r) { r.v = _mm512_loadu_ps(p); }
QK_LANE void load(const Half* p, Vec16& r) {
  r.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
QK_LANE void load(const BFloat16* p, Vec16& r) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  r.v = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
template <bool kStream>
QK_LANE void write(void* p, __m512i bits) {
  kStream ? _mm512_stream_si512(static_cast<__m512i*>(p), bits) : _mm512_storeu_si512(p, bits);
}
template <bool kStream>
QK_LANE void write(void* p, __m256i bits) {
  kStream ? _mm256_stream_si256(static_cast<__m256i*>(p), bits) : _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
}

template <bool kStream = false>
QK_LANE void store(float* p, Vec16 a) {
  write<kStream>(p, _mm512_castps_si512(a.v));
}
template <bool kStream = false>
QK_LANE void store(Half* p, Vec16 a) {
  write<kStream>(p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
template <bool kStream = false>
QK_LANE void store(BFloat16* p, Vec16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  write<kStream>(p, _mm512_cvtepi32_epi16(high));
}

template <bool kStream>
QK_LANE void select_group(const uint32_t* grad, const uint8_t* mask, uint32_t* out) {
  const __mmask16 keep = static_cast<__mmask16>(mask[0] | mask[1] << 8);
  write<kStream>(out, _mm512_maskz_loadu_epi32(keep, grad));
}
template <bool kStream>
QK_LANE void select_group(const uint16_t* grad, const uint8_t* mask, uint16_t* out) {
  const __mmask16 keep = static_cast<__mmask16>(mask[0] | mask[1] << 8);
  write<kStream>(out, _mm256_maskz_loadu_epi16(keep, grad));
}
template <>
struct SelectWidth<uint16_t> {
  static constexpr int value = 16;
};
template <>
struct SelectWidth<uint32_t> {
  static constexpr int value = 16;
};
