// The backward of a learned step size on the CPU: one stretch of memory, one thread. Once per instruction set.
//
//   formula   numerics/lsq_lane.h
//   layout    elements in memory order
//   bytes     x and grad are read once, dx is written once: 12 an element in float32, 6 in 16 bits; in place 8 and 4
//   numerics  float32 lanes; a stretch is summed lane by lane in float32, stretches in float64 in a fixed order

enum class Store { kPlain, kStreamed, kChanged };

// kChanged: over `before`, which most often it equals.
template <Store kStore, class T, class V>
QK_LANE void store_gradient(T* p, V value, V before) {
  if (kStore == Store::kChanged && equal_bits(value, before) == (1u << V::width) - 1) return;
  store<kStore == Store::kStreamed>(p, value);
}

template <Store kStore, class T>
static LsqSums gradient_stored(const void* x_data, const void* grad_data, void* dx_data, int64_t begin, int64_t end,
                               const ChannelParams& p, int64_t channel) {
  using V = typename VecOf<T>::type;
  const T *x = static_cast<const T*>(x_data), *grad = static_cast<const T*>(grad_data);
  T* dx = static_cast<T*>(dx_data);
  const Affine<V> params = {V::all(p.inverse[channel]), V::all(p.scale[channel]), V::all(p.zero_point[channel])};
  const V low = V::all(p.quant_min), high = V::all(p.quant_max), zero = V::all(0);
  V dscale[2] = {zero, zero}, dzero_point = zero, value, above;
  int64_t i = begin;
  for (; i + 2 * V::width <= end; i += 2 * V::width) {
    for (int k = 0; k < 2; ++k) {
      load(x + i + k * V::width, value);
      load(grad + i + k * V::width, above);
      const auto part = lsq_gradient_lane(value, above, params, low, high, zero);
      store_gradient<kStore>(dx + i + k * V::width, part.dx, above);
      dscale[k] = dscale[k] + part.dscale;
      dzero_point = dzero_point + part.dzero_point;
    }
  }
  for (; i < end; i += V::width) {
    const int64_t count = end - i < V::width ? end - i : V::width;
    load_some(x + i, count, value);
    load_some(grad + i, count, above);
    const auto part = lsq_gradient_lane(value, above, params, low, high, zero);
    store_some(dx + i, count, part.dx);
    dscale[0] = dscale[0] + part.dscale;
    dzero_point = dzero_point + part.dzero_point;
  }
  return {sum_of(dscale[0]) + sum_of(dscale[1]), sum_of(dzero_point)};
}

template <class T>
static LsqSums gradient_typed(const void* x, const void* grad, void* dx, int64_t begin, int64_t end,
                              const ChannelParams& p, int64_t channel, bool streamed) {
  if (dx == grad) return gradient_stored<Store::kChanged, T>(x, grad, dx, begin, end, p, channel);
  return streamed ? gradient_stored<Store::kStreamed, T>(x, grad, dx, begin, end, p, channel)
                  : gradient_stored<Store::kPlain, T>(x, grad, dx, begin, end, p, channel);
}

static LsqSums gradient(DType dtype, const void* x, const void* grad, void* dx, int64_t begin, int64_t end,
                        const ChannelParams& p, int64_t channel, bool streamed) {
  switch (dtype) {
    case DType::kFloat:
      return gradient_typed<float>(x, grad, dx, begin, end, p, channel, streamed);
    case DType::kHalf:
      return gradient_typed<Half>(x, grad, dx, begin, end, p, channel, streamed);
    case DType::kBFloat16:
      return gradient_typed<BFloat16>(x, grad, dx, begin, end, p, channel, streamed);
    case DType::kDouble:
      return gradient_typed<double>(x, grad, dx, begin, end, p, channel, streamed);
  }
  return {};
}

template <class V>
QK_LANE void add_some(float* sums, int64_t count, V value) {
  V before;
  if (count == V::width) {
    load(sums, before);
    store(sums, before + value);
  } else {
    load_some(sums, count, before);
    store_some(sums, count, before + value);
  }
}

template <class T>
static void column_gradient_typed(const void* x_data, const void* grad_data, void* dx_data, int64_t begin, int64_t end,
                                  const ChannelParams& p, float* dscale, float* dzero_point) {
  using V = typename VecOf<T>::type;
  const T *x = static_cast<const T*>(x_data), *grad = static_cast<const T*>(grad_data);
  T* dx = static_cast<T*>(dx_data);
  const V low = V::all(p.quant_min), high = V::all(p.quant_max), zero = V::all(0);
  for (int64_t row = begin; row < end; row += p.channels) {
    for (int64_t j = 0; j < p.channels; j += V::width) {
      const int64_t left = p.channels - j, count = left < V::width ? left : V::width, i = row + j;
      Affine<V> params;
      load(p.inverse + j, params.inverse);
      load(p.scale + j, params.scale);
      load(p.zero_point + j, params.zero_point);
      V value, above;
      if (count == V::width) {
        load(x + i, value);
        load(grad + i, above);
      } else {
        load_some(x + i, count, value);
        load_some(grad + i, count, above);
      }
      const auto part = lsq_gradient_lane(value, above, params, low, high, zero);
      if (count == V::width)
        store(dx + i, part.dx);
      else
        store_some(dx + i, count, part.dx);
      add_some(dscale + j, count, part.dscale);
      if (dzero_point) add_some(dzero_point + j, count, part.dzero_point);
    }
  }
}

static void column_gradient(DType dtype, const void* x, const void* grad, void* dx, int64_t begin, int64_t end,
                            const ChannelParams& p, float* dscale, float* dzero_point) {
  switch (dtype) {
    case DType::kFloat:
      return column_gradient_typed<float>(x, grad, dx, begin, end, p, dscale, dzero_point);
    case DType::kHalf:
      return column_gradient_typed<Half>(x, grad, dx, begin, end, p, dscale, dzero_point);
    case DType::kBFloat16:
      return column_gradient_typed<BFloat16>(x, grad, dx, begin, end, p, dscale, dzero_point);
    case DType::kDouble:
      return column_gradient_typed<double>(x, grad, dx, begin, end, p, dscale, dzero_point);
  }
}

static const LsqLoops lsq_loops{gradient, column_gradient};
