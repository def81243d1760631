// binarize on the CPU: one pass. The loops are in sign_loops_body.h.
#include <torch/library.h>

#include "../common/check_args.h"
#include "fake_quantize.h"
#include "parallel.h"
#include "sign_loops.h"

namespace quantkern::cpu {
namespace {

TensorPair binarize_cpu(const at::Tensor& x, bool with_mask) {
  check_input(x);
  auto [in, out] = dense_in_out(x);
  at::Tensor mask = new_mask(x, with_mask);
  uint8_t* inside = mask.numel() ? mask.mutable_data_ptr<uint8_t>() : nullptr;
  const auto loop = sign_loops().binarize;
  const DType dtype = dtype_of(in);
  const void* data = in.const_data_ptr();
  void* y = out.mutable_data_ptr();
  const bool streamed = is_streamed(in, out);
  for_stretches(in.numel(), [&](int64_t begin, int64_t end) { loop(dtype, data, y, inside, begin, end, streamed); });
  return {out, mask};
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) { m.impl("binarize_forward", quantkern::cpu::binarize_cpu); }
