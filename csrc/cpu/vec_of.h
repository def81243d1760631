// Which vector works on which element type, and the ends of stretches that do not fill one. Included once per
// instruction set, after the vectors; no include guard on purpose.

template <class T>
struct VecOf {
  using type = FloatVec;
};
template <>
struct VecOf<double> {
  using type = Lanes<double>;
};

// The first `count` elements of a group, zeros behind them.
template <class T, class V>
QK_LANE void load_some(const T* p, int64_t count, V& r) {
  T group[V::width] = {};
  std::memcpy(group, p, count * sizeof(T));
  load(group, r);
}
template <class T, class V>
QK_LANE void store_some(T* p, int64_t count, V value) {
  T group[V::width];
  store(group, value);
  std::memcpy(p, group, count * sizeof(T));
}

// The sum of all lanes, added up in a fixed order.
template <class V>
QK_LANE double sum_of(V value) {
  typename LaneType<V>::type lanes[V::width];
  store(lanes, value);
  double sum = 0;
  for (int k = 0; k < V::width; ++k) sum += static_cast<double>(lanes[k]);
  return sum;
}
