// Eight lanes as a plain array: the portable vector, and float64's on every instruction set. The loops are short
// enough for the compiler to turn into whatever vectors the target has.
//
// Included once per instruction set, inside its namespace (foreach_isa.h); no include guard on purpose.

template <class C>
struct Lanes {
  static constexpr int width = 8;
  C v[8];
  QK_LANE Lanes all(C value) {
    Lanes r;
    for (int i = 0; i < 8; ++i) r.v[i] = value;
    return r;
  }
};

#define QK_LANEWISE(expression)                    \
  Lanes<C> r;                                      \
  for (int i = 0; i < 8; ++i) r.v[i] = expression; \
  return r
template <class C>
QK_LANE Lanes<C> operator+(Lanes<C> a, Lanes<C> b) {
  QK_LANEWISE(a.v[i] + b.v[i]);
}
template <class C>
QK_LANE Lanes<C> operator-(Lanes<C> a, Lanes<C> b) {
  QK_LANEWISE(a.v[i] - b.v[i]);
}
template <class C>
QK_LANE Lanes<C> operator*(Lanes<C> a, Lanes<C> b) {
  QK_LANEWISE(a.v[i] * b.v[i]);
}
template <class C>
QK_LANE Lanes<C> operator/(Lanes<C> a, Lanes<C> b) {
  QK_LANEWISE(a.v[i] / b.v[i]);
}
template <class C>
QK_LANE Lanes<C> where_less(Lanes<C> a, Lanes<C> b, Lanes<C> yes, Lanes<C> no) {
  QK_LANEWISE(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
template <class C>
QK_LANE Lanes<C> constant(Lanes<C>, float value) {
  return Lanes<C>::all(static_cast<C>(value));
}
template <class C>
QK_LANE Lanes<C> magnitude(Lanes<C> a) {
  QK_LANEWISE(a.v[i] < 0 ? -a.v[i] : a.v[i]);
}
QK_LANE Lanes<float> with_sign_of(Lanes<float> a, Lanes<float> b) {
  Lanes<float> r;
  for (int i = 0; i < 8; ++i) r.v[i] = quantkern::with_sign_of(a.v[i], b.v[i]);
  return r;
}
QK_LANE Lanes<float> power_of_two(Lanes<float> n) {
  Lanes<float> r;
  for (int i = 0; i < 8; ++i) r.v[i] = quantkern::power_of_two(n.v[i]);
  return r;
}
// float64 has no polynomial of its own: it serves tests, not speed.
QK_LANE Lanes<double> tanh_lane(Lanes<double> a) {
  Lanes<double> r;
  for (int i = 0; i < 8; ++i) r.v[i] = __builtin_tanh(a.v[i]);
  return r;
}
template <class C>
QK_LANE Lanes<C> min_lane(Lanes<C> a, Lanes<C> b) {
  QK_LANEWISE(quantkern::min_lane(a.v[i], b.v[i]));
}
template <class C>
QK_LANE Lanes<C> max_lane(Lanes<C> a, Lanes<C> b) {
  QK_LANEWISE(quantkern::max_lane(a.v[i], b.v[i]));
}
template <class C>
QK_LANE Lanes<C> round_even(Lanes<C> a) {
  QK_LANEWISE(quantkern::round_even(a.v[i]));
}
template <class C>
QK_LANE Lanes<C> multiply_as_float(Lanes<C> a, Lanes<C> b) {
  QK_LANEWISE(quantkern::multiply_as_float(a.v[i], b.v[i]));
}
#undef QK_LANEWISE

// Bit i is set where lane i of a equals lane i of b; NaN equals nothing.
template <class C>
QK_LANE uint32_t equal_bits(Lanes<C> a, Lanes<C> b) {
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
  return bits;
}
// Bit i is set where lane i of a is less than lane i of b.
template <class C>
QK_LANE uint32_t less_bits(Lanes<C> a, Lanes<C> b) {
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return bits;
}

template <class C>
QK_LANE void load(const float* p, Lanes<C>& r) {
  for (int i = 0; i < 8; ++i) r.v[i] = static_cast<C>(p[i]);
}
QK_LANE void load(const double* p, Lanes<double>& r) {
  for (int i = 0; i < 8; ++i) r.v[i] = p[i];
}
QK_LANE void load(const Half* p, Lanes<float>& r) {
  for (int i = 0; i < 8; ++i) r.v[i] = to_float(p[i]);
}
QK_LANE void load(const BFloat16* p, Lanes<float>& r) {
  for (int i = 0; i < 8; ++i) r.v[i] = to_float(p[i]);
}
QK_LANE void load(const uint8_t* p, Lanes<float>& r) {
  for (int i = 0; i < 8; ++i) r.v[i] = static_cast<float>(p[i]);
}
// Whole numbers from 0 to 255; some byte for every other.
QK_LANE void store_bytes(uint8_t* p, Lanes<float> a) {
  for (int i = 0; i < 8; ++i)
    p[i] = a.v[i] >= 0.0f && a.v[i] <= 255.0f ? static_cast<uint8_t>(static_cast<int>(a.v[i])) : 0;
}
QK_LANE void store_block(uint8_t* p, const Lanes<float> (&a)[4]) {
  for (int k = 0; k < 4; ++k) store_bytes(p + 8 * k, a[k]);
}
// kStream: past the caches, where the target can; p is then aligned to the size of the group.
template <bool kStream = false, class T, class C>
QK_LANE void store(T* p, Lanes<C> a) {
  for (int i = 0; i < 8; ++i) p[i] = from_compute<T>(a.v[i]);
}

// out = grad where the mask bit is set, else +0; E is an unsigned integer of the element's size.
template <bool kStream, class E>
QK_LANE void select_group(const E* grad, const uint8_t* mask, E* out) {
  for (int i = 0; i < 8; ++i) out[i] = grad[i] & (static_cast<E>(0) - static_cast<E>((mask[0] >> i) & 1));
}
template <class E>
struct SelectWidth {
  static constexpr int value = 8;
};

// float for every vector of float32 lanes, double for Lanes<double>.
template <class V>
struct LaneType {
  using type = float;
};
template <>
struct LaneType<Lanes<double>> {
  using type = double;
};
