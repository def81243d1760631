// dorefa_gradient on the CPU: the largest magnitude of every sample, then one pass with random numbers by position.
#include <torch/library.h>

#include "../common/check_args.h"
#include "dorefa_loops.h"
#include "fake_quantize.h"
#include "parallel.h"
#include "ranges.h"

namespace quantkern::cpu {
namespace {

// Copies a row whose width cannot be used, or leaves zeros; the rest goes through the kernel.
void quantize_row(const DorefaLoops& loops, const at::Tensor& in, const at::Tensor& out, int64_t begin, int64_t end,
                  float width, float steps, uint64_t seed) {
  const int64_t size = in.element_size(), bytes = (end - begin) * size;
  const char* g = static_cast<const char*>(in.const_data_ptr()) + begin * size;
  char* y = static_cast<char*>(out.mutable_data_ptr()) + begin * size;
  if (!is_finite(width)) {
    if (y != g) std::memcpy(y, g, bytes);
  } else if (width > 0.0f) {
    loops.gradient(dtype_of(in), in.const_data_ptr(), out.mutable_data_ptr(), begin, end, width, steps, seed);
  } else {
    std::memset(y, 0, bytes);
  }
}

at::Tensor dorefa_gradient_cpu(const at::Tensor& grad, int64_t bits, const at::Tensor& seed) {
  check_dorefa(grad, bits);
  check_state(seed, grad, std::nullopt, at::kLong, "seed");
  auto [in_, out_] = dense_in_out(grad);
  const at::Tensor in = in_, out = out_;
  if (grad.numel() == 0) return out;
  const Layout layout = layout_of(out, grad.dim() > 1 ? std::optional<int64_t>(0) : std::nullopt);
  std::vector<float> widths;
  for (const Range& range : channel_ranges(in, layout))
    widths.push_back(is_seen(range) ? 2.0f * max_lane(-range.min, range.max) : 0.0f);
  const DorefaLoops& loops = dorefa_loops();
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  for_stretches(in.numel(), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / layout.inner, stop = std::min(end, (row + 1) * layout.inner);
      quantize_row(loops, in, out, begin, stop, widths[row % layout.channels], dorefa_steps(bits), key);
      begin = stop;
    }
  });
  return out;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("dorefa_gradient", quantkern::cpu::dorefa_gradient_cpu); }
