// DoReFa's transforms on the CPU: one stretch of memory, one thread. Compiled once per instruction set.
//
//   formula   numerics/dorefa_lane.h, numerics/philox.h
//   layout    elements in memory order
//   bytes     weight: read once for the maximum, read and written once; its backward reads w and grad, writes dw;
//             activation and gradient: read and written once
//   numerics  float32 lanes, true divisions; sums in float64, in memory order

// Calls body(i, count, whole) for every group of lanes of [begin, end); a macro keeps the target's instructions.
#define QK_FOR_GROUPS(V, begin, end) \
  for (int64_t i = (begin), count; count = (end) - i < V::width ? (end) - i : V::width, i < (end); i += V::width)

template <class T, class V>
QK_LANE void load_group(const T* p, int64_t count, V& r) {
  count == V::width ? load(p, r) : load_some(p, count, r);
}
template <class T, class V>
QK_LANE void store_group(T* p, int64_t count, V value) {
  count == V::width ? store(p, value) : store_some(p, count, value);
}

template <class T>
static void weight_typed(const void* w_data, void* y_data, int64_t begin, int64_t end, float width, float steps) {
  using V = FloatVec;
  const T* w = static_cast<const T*>(w_data);
  T* y = static_cast<T*>(y_data);
  V value;
  QK_FOR_GROUPS(V, begin, end) {
    load_group(w + i, count, value);
    store_group(y + i, count, dorefa_weight_lane(value, V::all(width), V::all(steps)));
  }
}

template <class T>
static void sign_typed(const void* w_data, void* y_data, int64_t begin, int64_t end, float magnitude) {
  using V = FloatVec;
  const T* w = static_cast<const T*>(w_data);
  T* y = static_cast<T*>(y_data);
  const V zero = V::all(0), plus = V::all(magnitude), minus = V::all(-magnitude);
  V value;
  QK_FOR_GROUPS(V, begin, end) {
    load_group(w + i, count, value);
    // value - value + plus: NaN stays NaN, infinities are handled by their sign first.
    const V finite = where_less(zero, value, zero, where_less(value, zero, zero, value));
    store_group(y + i, count, where_less(value, zero, minus, plus + finite));
  }
}

template <class T>
static double magnitude_sum_typed(const void* w_data, int64_t begin, int64_t end) {
  using V = FloatVec;
  const T* w = static_cast<const T*>(w_data);
  V value, sum = V::all(0);
  QK_FOR_GROUPS(V, begin, end) {
    load_group(w + i, count, value);
    sum = sum + magnitude(value);
  }
  return sum_of(sum);
}

template <class T>
static DorefaSums weight_gradient_typed(const void* w_data, const void* grad_data, void* dw_data, int64_t begin,
                                        int64_t end, float largest) {
  using V = FloatVec;
  const T *w = static_cast<const T*>(w_data), *grad = static_cast<const T*>(grad_data);
  T* dw = static_cast<T*>(dw_data);
  const V m = V::all(largest);
  V value, above, t, sum = V::all(0);
  int64_t at_largest = 0;
  QK_FOR_GROUPS(V, begin, end) {
    load_group(w + i, count, value);
    load_group(grad + i, count, above);
    store_group(dw + i, count, dorefa_weight_gradient_lane(value, above, m, t));
    sum = sum + above * t;
    at_largest += __builtin_popcount(equal_bits(magnitude(t), m));
  }
  return {sum_of(sum), at_largest};
}

template <class T>
static void weight_gradient_at_largest_typed(const void* w_data, const void* grad_data, void* dw_data, int64_t begin,
                                             int64_t end, float largest, float through_largest) {
  const T *w = static_cast<const T*>(w_data), *grad = static_cast<const T*>(grad_data);
  T* dw = static_cast<T*>(dw_data);
  for (int64_t i = begin; i < end; ++i) {
    const float t = quantkern::tanh_lane(to_float(w[i]));
    if (quantkern::magnitude(t) != largest) continue;
    const float through = t < 0 ? -through_largest : through_largest;
    dw[i] = from_compute<T>((to_float(grad[i]) / largest - through) * (1.0f - t * t));
  }
}

template <class T>
static void activation_typed(const void* x_data, void* y_data, uint8_t* mask, int64_t begin, int64_t end, float steps) {
  using V = FloatVec;
  const T* x = static_cast<const T*>(x_data);
  T* y = static_cast<T*>(y_data);
  const V zero = V::all(0), one = V::all(1), n = V::all(steps);
  V value;
  QK_FOR_GROUPS(V, begin, end) {
    load_group(x + i, count, value);
    store_group(y + i, count, dorefa_activation_lane(value, zero, one, n));
    if (!mask) continue;
    const uint32_t inside = equal_bits(value, min_lane(one, max_lane(zero, value))) & ((1u << count) - 1u);
    mask[i / 8] = static_cast<uint8_t>(inside);
    if (count > 8) mask[i / 8 + 1] = static_cast<uint8_t>(inside >> 8);
  }
}

// Eight blocks of random words side by side, as the compiler likes them: noise of elements first .. first + 31.
static void noise_of(uint64_t seed, int64_t first, float* noise) {
  uint32_t words[4][8];
  for (int b = 0; b < 8; ++b) {
    const PhiloxBlock block = philox(seed, static_cast<uint64_t>(first / 4 + b));
    for (int k = 0; k < 4; ++k) words[k][b] = block.word[k];
  }
  for (int b = 0; b < 8; ++b)
    for (int k = 0; k < 4; ++k) noise[4 * b + k] = centered_uniform(words[k][b]);
}

template <class T>
static void gradient_typed(const void* grad_data, void* out_data, int64_t begin, int64_t end, float width, float steps,
                           uint64_t seed) {
  using V = FloatVec;
  constexpr int64_t kNoise = 32;
  const T* grad = static_cast<const T*>(grad_data);
  T* out = static_cast<T*>(out_data);
  const V w = V::all(width), n = V::all(steps), zero = V::all(0);
  for (int64_t block = begin / kNoise * kNoise; block < end; block += kNoise) {
    float noise[kNoise + kMaxLanes] = {};
    noise_of(seed, block, noise);
    const int64_t first = block < begin ? begin : block, last = block + kNoise < end ? block + kNoise : end;
    V value, own_noise;
    QK_FOR_GROUPS(V, first, last) {
      load_group(grad + i, count, value);
      load(noise + (i - block), own_noise);
      store_group(out + i, count, dorefa_gradient_lane(value, w, n, own_noise, zero));
    }
  }
}
#undef QK_FOR_GROUPS

// The element type's instance of a loop; float64 is refused before.
#define QK_BY_DTYPE(loop, ...)                               \
  (dtype == DType::kHalf       ? loop<Half>(__VA_ARGS__)     \
   : dtype == DType::kBFloat16 ? loop<BFloat16>(__VA_ARGS__) \
                               : loop<float>(__VA_ARGS__))

static void weight(DType dtype, const void* w, void* y, int64_t begin, int64_t end, float width, float steps) {
  QK_BY_DTYPE(weight_typed, w, y, begin, end, width, steps);
}
static void sign(DType dtype, const void* w, void* y, int64_t begin, int64_t end, float value) {
  QK_BY_DTYPE(sign_typed, w, y, begin, end, value);
}
static double magnitude_sum(DType dtype, const void* w, int64_t begin, int64_t end) {
  return QK_BY_DTYPE(magnitude_sum_typed, w, begin, end);
}
static DorefaSums weight_gradient(DType dtype, const void* w, const void* grad, void* dw, int64_t begin, int64_t end,
                                  float largest) {
  return QK_BY_DTYPE(weight_gradient_typed, w, grad, dw, begin, end, largest);
}
static void weight_gradient_at_largest(DType dtype, const void* w, const void* grad, void* dw, int64_t begin,
                                       int64_t end, float largest, float through_largest) {
  QK_BY_DTYPE(weight_gradient_at_largest_typed, w, grad, dw, begin, end, largest, through_largest);
}
static void activation(DType dtype, const void* x, void* y, uint8_t* mask, int64_t begin, int64_t end, float steps) {
  QK_BY_DTYPE(activation_typed, x, y, mask, begin, end, steps);
}
static void gradient(DType dtype, const void* grad, void* out, int64_t begin, int64_t end, float width, float steps,
                     uint64_t seed) {
  QK_BY_DTYPE(gradient_typed, grad, out, begin, end, width, steps, seed);
}
#undef QK_BY_DTYPE

static const DorefaLoops dorefa_loops{weight,     sign,    magnitude_sum, weight_gradient, weight_gradient_at_largest,
                                      activation, gradient};
