// dorefa_weight on the CPU. The maximum is sought before tanh, which is monotonic: tanh is computed once an element.
#include <torch/library.h>

#include <ATen/ops/scalar_tensor.h>

#include "../common/check_args.h"
#include "../numerics/dorefa.h"
#include "dorefa_loops.h"
#include "fake_quantize.h"
#include "parallel.h"
#include "ranges.h"

namespace quantkern::cpu {
namespace {

template <class Part, class F>
std::vector<Part> by_stretches(int64_t numel, int64_t grain, const F& loop) {
  std::vector<Part> parts((numel + kSumStretch - 1) / kSumStretch);
  at::parallel_for(0, static_cast<int64_t>(parts.size()), grain / kSumStretch, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) parts[i] = loop(i * kSumStretch, std::min(numel, (i + 1) * kSumStretch));
  });
  return parts;
}

// max|w|, or mean|w| with one bit.
float statistic(const at::Tensor& in, int64_t bits) {
  if (bits > 1) {
    const Range range = channel_ranges(in, {1, 1, in.numel()})[0];
    return is_seen(range) ? max_lane(-range.min, range.max) : 0.0f;
  }
  const DType dtype = dtype_of(in);
  const void* w = in.const_data_ptr();
  double sum = 0;
  const auto loop = dorefa_loops().magnitude_sum;
  for (double part :
       by_stretches<double>(in.numel(), kGrain, [&](int64_t begin, int64_t end) { return loop(dtype, w, begin, end); }))
    sum += part;
  return static_cast<float>(sum / static_cast<double>(std::max<int64_t>(1, in.numel())));
}

TensorPair dorefa_weight_cpu(const at::Tensor& x, int64_t bits) {
  check_dorefa(x, bits);
  auto [in, out] = dense_in_out(x);
  const float found = statistic(in, bits);
  const DorefaLoops& loops = dorefa_loops();
  const DType dtype = dtype_of(in);
  const void* w = in.const_data_ptr();
  void* y = out.mutable_data_ptr();
  const float width = 2.0f * max_lane(kSmallestScale, tanh_lane(found));
  for_stretches(
      in.numel(),
      [&](int64_t begin, int64_t end) {
        bits == 1 ? loops.sign(dtype, w, y, begin, end, found)
                  : loops.weight(dtype, w, y, begin, end, width, dorefa_steps(bits));
      },
      bits == 1 ? kGrain : kTanhGrain);
  return {out, at::scalar_tensor(found, x.options().dtype(at::kFloat))};
}

at::Tensor dorefa_weight_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& largest) {
  check_dorefa(x, 2);
  check_gradient(grad, x);
  check_state(largest, x, std::nullopt, at::kFloat, "largest");
  auto [in, out] = dense_in_out(x);
  const at::Tensor above = in_layout_of(grad, out);
  const float m = tanh_lane(*largest.const_data_ptr<float>());
  if (m == 0.0f) return out.zero_();
  const DorefaLoops& loops = dorefa_loops();
  const DType dtype = dtype_of(in);
  // dw overwrites a copied w, which the second look at it still needs.
  const at::Tensor kept = in.is_same(out) ? in.clone() : in;
  const void *w = kept.const_data_ptr(), *g = above.const_data_ptr();
  void* dw = out.mutable_data_ptr();
  const auto parts = by_stretches<DorefaSums>(in.numel(), kTanhGrain, [&](int64_t begin, int64_t end) {
    return loops.weight_gradient(dtype, w, g, dw, begin, end, m);
  });
  DorefaSums sums;
  for (const DorefaSums& part : parts) {
    sums.grad_tanh += part.grad_tanh;
    sums.at_largest += part.at_largest;
  }
  if (sums.at_largest == 0) return out;
  // Not m * m, which underflows where every weight is tiny.
  const float through = static_cast<float>(sums.grad_tanh) / m / m / static_cast<float>(sums.at_largest);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].at_largest == 0) continue;
    const int64_t begin = static_cast<int64_t>(i) * kSumStretch, end = std::min(in.numel(), begin + kSumStretch);
    loops.weight_gradient_at_largest(dtype, w, g, dw, begin, end, m, through);
  }
  return out;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("dorefa_weight_forward", quantkern::cpu::dorefa_weight_cpu);
  m.impl("dorefa_weight_backward", quantkern::cpu::dorefa_weight_backward_cpu);
}
