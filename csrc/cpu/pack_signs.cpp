// pack_signs and unpack_signs on the CPU: layout and threads. The loops are in sign_loops_body.h.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/check_args.h"
#include "../common/check_packed.h"
#include "parallel.h"
#include "sign_loops.h"

namespace quantkern::cpu {
namespace {

// Rows of k elements: at least so many are worth a thread.
int64_t grain(int64_t k) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)); }

uint32_t* words_in(const at::Tensor& packed) { return reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>()); }
const uint32_t* words_of_tensor(const at::Tensor& packed) {
  return reinterpret_cast<const uint32_t*>(packed.const_data_ptr<int32_t>());
}

at::Tensor pack_signs_cpu(const at::Tensor& x, int64_t axis) {
  check_input(x);
  TORCH_CHECK_INDEX(x.dim() > 0, "x must have a dimension to pack, got a tensor without any");
  axis = *check_axis(x, axis);
  const int64_t k = x.size(axis);
  at::Tensor moved = x.movedim(axis, -1);
  std::vector<int64_t> sizes = moved.sizes().vec();
  sizes.back() = words_of(k);
  const at::Tensor packed = at::empty(sizes, x.options().dtype(at::kInt));
  if (!packed.numel()) return packed;
  const int64_t rows = packed.numel() / sizes.back();
  const auto& loops = sign_loops();
  const DType dtype = dtype_of(x);
  uint32_t* words = words_in(packed);
  if (!moved.is_contiguous() && x.is_contiguous()) {  // columns, read as they lie
    const int64_t inner = x.stride(axis);
    at::parallel_for(0, rows, grain(k), [&](int64_t begin, int64_t end) {
      loops.pack_columns(dtype, x.const_data_ptr(), k, inner, words, begin, end);
    });
    return packed;
  }
  moved = moved.contiguous();
  at::parallel_for(0, rows, grain(k), [&](int64_t begin, int64_t end) {
    loops.pack_rows(dtype, moved.const_data_ptr(), k, words, begin, end);
  });
  return packed;
}

std::tuple<at::Tensor, at::Tensor> pack_signs_counted_cpu(const at::Tensor& x, int64_t axis) {
  const at::Tensor packed = pack_signs_cpu(x, axis);
  const at::Tensor counts = at::empty(packed.sizes().slice(0, packed.dim() - 1), packed.options());
  const int64_t words = packed.size(-1);
  const uint32_t* in = words_of_tensor(packed);
  int32_t* out = counts.mutable_data_ptr<int32_t>();
  at::parallel_for(0, counts.numel(), grain(words * kWordBits), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t sum = 0;
      for (int64_t w = 0; w < words; ++w) sum += __builtin_popcount(in[row * words + w]);
      out[row] = sum;
    }
  });
  return {packed, counts};
}

at::Tensor unpack_signs_cpu(const at::Tensor& packed, int64_t k, at::ScalarType dtype) {
  check_packed(packed, k, "packed");
  std::vector<int64_t> sizes = packed.sizes().vec();
  sizes.back() = k;
  const at::Tensor y = at::empty(sizes, packed.options().dtype(dtype));
  const DType type = dtype_of(y);
  if (!y.numel()) return y;
  const auto loop = sign_loops().unpack;
  at::parallel_for(0, y.numel() / k, grain(k), [&](int64_t begin, int64_t end) {
    loop(type, words_of_tensor(packed), k, y.mutable_data_ptr(), begin, end);
  });
  return y;
}

}  // namespace
}  // namespace quantkern::cpu

TORCH_LIBRARY_IMPL(quantkern, CPU, m) {
  m.impl("pack_signs", quantkern::cpu::pack_signs_cpu);
  m.impl("pack_signs_counted", quantkern::cpu::pack_signs_counted_cpu);
  m.impl("unpack_signs", quantkern::cpu::unpack_signs_cpu);
}
