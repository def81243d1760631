// lsq on the CPU: checks, layout, threads, and the order in which partial sums are added.
//
// The backward is cut into stretches of a fixed size, whatever the number of threads, and their sums are added in
// float64 in memory order: the same bits with one thread and with many.
#include <torch/library.h>

#include <ATen/ops/zeros_like.h>

#include "../common/check_args.h"
#include "fake_quantize.h"
#include "lsq_loops.h"
#include "parallel.h"

namespace quantkern::cpu {

void set_lsq_params(PreparedParams& params, const Layout& layout, const at::Tensor& scale,
                    const std::optional<at::Tensor>& zero_point) {
  const at::Tensor scales = scale.contiguous(), zeros = zero_point.has_value() ? zero_point->contiguous() : scales;
  const float *s = scales.const_data_ptr<float>(), *z = zeros.const_data_ptr<float>();
  for (int64_t c = 0; c < scales.numel(); ++c) {
    const float inverse = check_scale_value(s[c]);
    if (c < layout.channels) params.set(c, inverse, s[c], zero_point.has_value() ? z[c] : 0.0f);
  }
  params.finish();
}

namespace {

using MaybeTensor = std::optional<at::Tensor>;

at::Tensor lsq_cpu(const at::Tensor& x, const at::Tensor& scale, int64_t quant_min, int64_t quant_max,
                   std::optional<int64_t> axis, const MaybeTensor& zero_point, std::optional<at::ScalarType> dtype) {
  axis = check_lsq(x, scale, quant_min, quant_max, axis, zero_point);
  auto [in, out] = dense_in_out(x, result_dtype(x, dtype));
  const Layout layout = layout_of(out, axis);
  PreparedParams params(layout, quant_min, quant_max);
  set_lsq_params(params, layout, scale, zero_point);
  run_fake_quantize(in, out, new_mask(x, false), params.view());
  return out;
}

struct Backward {
  DType dtype;
  const void *x, *grad;
  void* dx;
  int64_t numel;
  bool streamed;
};

// Long rows: stretches of at most kSumStretch elements, none of them over the end of a row.
std::vector<LsqSums> row_gradients(const Backward& b, const Layout& layout, const ChannelParams& params) {
  const auto loop = lsq_loops().gradient;
  const int64_t pieces = (layout.inner + kSumStretch - 1) / kSumStretch, rows = layout.outer * layout.channels;
  // Streamed stores want groups that begin at their own multiples.
  const bool streamed = b.streamed && (rows == 1 || layout.inner % kStretch == 0);
  std::vector<LsqSums> parts(rows * pieces), sums(layout.channels);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(layout.inner, kSumStretch));
  at::parallel_for(0, rows * pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / pieces, begin = row * layout.inner + i % pieces * kSumStretch;
      const int64_t end = std::min(begin + kSumStretch, (row + 1) * layout.inner);
      parts[i] = loop(b.dtype, b.x, b.grad, b.dx, begin, end, params, row % layout.channels, streamed);
    }
    if (streamed) stream_fence();
  });
  for (int64_t i = 0; i < rows * pieces; ++i) {
    LsqSums& sum = sums[i / pieces % layout.channels];
    sum.dscale += parts[i].dscale;
    sum.dzero_point += parts[i].dzero_point;
  }
  return sums;
}

// Short rows that repeat: every column of channels * inner is summed down blocks of at least eight rows.
std::vector<LsqSums> column_gradients(const Backward& b, const Layout& layout, const ChannelParams& params,
                                      bool with_zero_point) {
  const auto loop = lsq_loops().column_gradient;
  const int64_t period = params.channels, rows_a_block = std::max<int64_t>(8, 65536 / period);
  const int64_t block = rows_a_block * period, blocks = (b.numel + block - 1) / block;
  std::vector<float> dscale(blocks * period), dzero(with_zero_point ? blocks * period : 0);
  at::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / block), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      loop(b.dtype, b.x, b.grad, b.dx, i * block, std::min(b.numel, (i + 1) * block), params,
           dscale.data() + i * period, with_zero_point ? dzero.data() + i * period : nullptr);
  });
  std::vector<LsqSums> sums(layout.channels);
  for (int64_t i = 0; i < blocks; ++i) {
    for (int64_t c = 0, j = i * period; c < layout.channels; ++c) {
      for (const int64_t end = j + layout.inner; j < end; ++j) {
        sums[c].dscale += dscale[j];
        if (with_zero_point) sums[c].dzero_point += dzero[j];
      }
    }
  }
  return sums;
}

struct LsqGradients {
  at::Tensor dscale, dzero_point;
};

// The arguments are checked; in, above and out are dense with the same strides, and out may be one of them.
LsqGradients run_backward(const at::Tensor& in, const at::Tensor& above, const at::Tensor& out, const at::Tensor& scale,
                          int64_t quant_min, int64_t quant_max, double grad_scale, std::optional<int64_t> axis,
                          const MaybeTensor& zero_point) {
  at::Tensor dscale = at::zeros_like(scale, at::MemoryFormat::Contiguous);
  at::Tensor dzero = zero_point.has_value() ? at::zeros_like(*zero_point, at::MemoryFormat::Contiguous)
                                            : at::empty({0}, scale.options());
  if (in.numel() == 0) return {dscale, dzero};
  // A row that does not repeat is no column: its sums would be as many as its elements.
  const Layout layout = layout_of(out, axis);
  const bool columns = layout.channels > 1 && layout.inner < kShortRow && layout.outer > 1;
  PreparedParams params(layout, quant_min, quant_max, /*as_columns=*/columns);
  set_lsq_params(params, layout, scale, zero_point);
  const Backward work{dtype_of(in),           in.const_data_ptr(), above.const_data_ptr(),
                      out.mutable_data_ptr(), in.numel(),          is_streamed(in, out) && !above.is_same(out)};
  const std::vector<LsqSums> sums = params.is_columns()
                                        ? column_gradients(work, layout, params.view(), zero_point.has_value())
                                        : row_gradients(work, layout, params.view());
  for (int64_t c = 0; c < layout.channels; ++c) {
    dscale.mutable_data_ptr<float>()[c] = static_cast<float>(sums[c].dscale * grad_scale);
    if (zero_point.has_value())
      dzero.mutable_data_ptr<float>()[c] = static_cast<float>(sums[c].dzero_point * grad_scale);
  }
  return {dscale, dzero};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lsq_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                                                const at::Tensor& scale, int64_t quant_min,
                                                                int64_t quant_max, double grad_scale,
                                                                std::optional<int64_t> axis,
                                                                const MaybeTensor& zero_point) {
  axis = check_lsq(x, scale, quant_min, quant_max, axis, zero_point);
  check_gradient(grad, x);
  auto [in, out] = dense_in_out(x);
  const at::Tensor above = in_layout_of(grad, out);
  const auto [dscale, dzero] = run_backward(in, above, out, scale, quant_min, quant_max, grad_scale, axis, zero_point);
  return {out, dscale, dzero};
}

std::tuple<at::Tensor, at::Tensor> lsq_backward_in_place_cpu(at::Tensor& grad, const at::Tensor& x,
                                                             const at::Tensor& scale, int64_t quant_min,
                                                             int64_t quant_max, double grad_scale,
                                                             std::optional<int64_t> axis,
                                                             const MaybeTensor& zero_point) {
  axis = check_lsq(x, scale, quant_min, quant_max, axis, zero_point);
  check_gradient(grad, x);
  check_same_memory(grad, x);
  const auto [dscale, dzero] = run_backward(x, grad, grad, scale, quant_min, quant_max, grad_scale, axis, zero_point);
  return {dscale, dzero};
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("lsq_forward", quantkern::cpu::lsq_cpu);
  m.impl("lsq_backward", quantkern::cpu::lsq_backward_cpu);
  m.impl("lsq_backward_", quantkern::cpu::lsq_backward_in_place_cpu);
}
