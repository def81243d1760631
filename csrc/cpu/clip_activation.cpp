// clip_activation on the CPU: one pass. The loops are in fake_quantize_loops_body.h.
#include <torch/library.h>

#include "../common/check_args.h"
#include "fake_quantize.h"
#include "parallel.h"

namespace quantkern::cpu {

void run_clip(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask, double lower, double upper) {
  uint8_t* bits = mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const auto loop = fake_quantize_loops().clip;
  const DType dtype = dtype_of(in);
  const void* x = in.const_data_ptr();
  void* y = out.mutable_data_ptr();
  const bool streamed = is_streamed(in, out);
  for_stretches(in.numel(),
                [&](int64_t begin, int64_t end) { loop(dtype, x, y, bits, begin, end, lower, upper, streamed); });
}

namespace {

TensorPair clip_activation_cpu(const at::Tensor& x, double lower, double upper, bool with_mask) {
  check_input(x);
  check_bounds(lower, upper);
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  run_clip(in, out, mask, lower, upper);
  return {out, mask};
}

at::Tensor clip_activation_in_place_cpu(at::Tensor& x, double lower, double upper, bool with_mask) {
  check_input(x);
  check_bounds(lower, upper);
  check_dense(x, "x");
  at::Tensor mask = new_mask(x, with_mask);
  run_clip(x, x, mask, lower, upper);
  return mask;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("clip_activation_forward", quantkern::cpu::clip_activation_cpu);
  m.impl("clip_activation_", quantkern::cpu::clip_activation_in_place_cpu);
}
