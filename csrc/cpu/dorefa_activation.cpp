// dorefa_activation on the CPU: one pass.
#include <torch/library.h>

#include "../common/check_args.h"
#include "dorefa_loops.h"
#include "fake_quantize.h"
#include "parallel.h"

namespace quantkern::cpu {
namespace {

TensorPair dorefa_activation_cpu(const at::Tensor& x, int64_t bits, bool with_mask) {
  check_dorefa(x, bits);
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  uint8_t* inside = mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const auto loop = dorefa_loops().activation;
  const DType dtype = dtype_of(in);
  const void* data = in.const_data_ptr();
  void* y = out.mutable_data_ptr();
  for_stretches(in.numel(),
                [&](int64_t begin, int64_t end) { loop(dtype, data, y, inside, begin, end, dorefa_steps(bits)); });
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("dorefa_activation_forward", quantkern::cpu::dorefa_activation_cpu); }
