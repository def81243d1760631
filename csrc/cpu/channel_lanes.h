// The parameters of a group of lanes. Included by loops, once per instruction set; no include guard on purpose.

template <class V>
QK_LANE Affine<V> load_params(const float* inverse, const float* scale, const float* zero_point) {
  Affine<V> p;
  load(inverse, p.inverse);
  load(scale, p.scale);
  load(zero_point, p.zero_point);
  return p;
}

template <class V>
QK_LANE Affine<V> params_of(const ChannelParams& p, int64_t channel) {
  return {V::all(p.inverse[channel]), V::all(p.scale[channel]), V::all(p.zero_point[channel])};
}

// A group that crosses the end of a row.
template <class V>
QK_LANE Affine<V> gather_params(const ChannelParams& p, int64_t i) {
  float inverse[V::width], scale[V::width], zero_point[V::width];
  for (int64_t lane = 0; lane < V::width; ++lane) {
    const int64_t c = (i + lane) / p.inner % p.channels;
    inverse[lane] = p.inverse[c];
    scale[lane] = p.scale[c];
    zero_point[lane] = p.zero_point[c];
  }
  return load_params<V>(inverse, scale, zero_point);
}
