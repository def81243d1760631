// pack_signs, unpack_signs and arrange_signs on CUDA: checks, layout, registration. The kernels are in pack_signs.cu.
#include <torch/library.h>

#include "pack_signs.cuh"
#include "packed_entry.h"

namespace quantkern::cuda {
namespace {

// x as the kernels read it: rows along the packed axis, or columns of a contiguous x. Anything else is copied.
struct PackedView {
  at::Tensor x;
  ChannelView view;
};

PackedView packed_view(const at::Tensor& x, int64_t axis) {
  const int64_t k = x.size(axis);
  const at::Tensor rows = x.movedim(axis, -1);
  if (rows.is_contiguous() || !x.is_contiguous()) return {rows.contiguous(), {k ? x.numel() / k : 0, k, 1}};
  const int64_t inner = x.stride(axis);
  return {x, {x.numel() ? x.numel() / (k * inner) : 0, k, inner}};
}

at::Tensor pack_signs_cuda(const at::Tensor& x, int64_t axis) {
  check_cuda_input(x);
  axis = *check_axis(x, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.erase(shape.begin() + axis);
  shape.push_back(words_of(x.size(axis)));
  const at::Tensor packed = at::empty(shape, x.options().dtype(at::kInt));
  if (x.numel() == 0) return packed;
  const PackedView source = packed_view(x, axis);
  const PackArguments arguments = {dtype_of(x), source.x.const_data_ptr(), mutable_words(packed), source.view};
  C10_CUDA_CHECK(launch_pack_signs(arguments, c10::cuda::getCurrentCUDAStream()));
  return packed;
}

void count_signs(const at::Tensor& packed, int64_t rows, int64_t words, void* counts) {
  C10_CUDA_CHECK(launch_count_signs(const_words(packed), rows, words, static_cast<int*>(counts),
                                    c10::cuda::getCurrentCUDAStream()));
}

TensorPair pack_signs_counted_cuda(const at::Tensor& x, int64_t axis) {
  const at::Tensor packed = pack_signs_cuda(x, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor counts = at::empty(packed.sizes().slice(0, packed.dim() - 1), packed.options());
  count_signs(packed, counts.numel(), packed.size(-1), counts.mutable_data_ptr());
  return {packed, counts};
}

at::Tensor unpack_signs_cuda(const at::Tensor& packed, int64_t k, at::ScalarType dtype) {
  check_packed(packed, k, "packed");
  const c10::cuda::CUDAGuard guard(packed.device());
  std::vector<int64_t> shape = packed.sizes().vec();
  shape.back() = k;
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                   "dtype must be float32, float16 or bfloat16 on ", packed.device(), ", got ", dtype);
  const at::Tensor y = at::empty(shape, packed.options().dtype(dtype));
  const UnpackArguments arguments = {dtype_of(y), const_words(packed), y.mutable_data_ptr(), k ? y.numel() / k : 0, k};
  C10_CUDA_CHECK(launch_unpack_signs(arguments, c10::cuda::getCurrentCUDAStream()));
  return y;
}

// The ones in every row, as bytes of int32. How many signs a row holds is not known here: padding bits must be 0.
at::Tensor arrange_signs_cuda(const at::Tensor& packed) {
  TORCH_CHECK_VALUE(packed.dim() > 0, "packed must have a dimension of rows, got a 0-d tensor");
  check_packed(packed, packed.size(-1) * kWordBits, "packed");
  const c10::cuda::CUDAGuard guard(packed.device());
  const int64_t rows = packed.size(0);
  const at::Tensor counts = at::empty({rows * static_cast<int64_t>(sizeof(int))}, packed.options().dtype(at::kByte));
  count_signs(packed, rows, rows ? packed.numel() / rows : 0, counts.mutable_data_ptr());
  return counts;
}

}  // namespace
}  // namespace quantkern::cuda

TORCH_LIBRARY_IMPL(quantkern, CUDA, m) {
  m.impl("pack_signs", quantkern::cuda::pack_signs_cuda);
  m.impl("pack_signs_counted", quantkern::cuda::pack_signs_counted_cuda);
  m.impl("unpack_signs", quantkern::cuda::unpack_signs_cuda);
  m.impl("arrange_signs", quantkern::cuda::arrange_signs_cuda);
}
