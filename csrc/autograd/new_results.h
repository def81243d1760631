// Memory for the results of operations on lists. Plain CPU tensors come straight from the allocator: in a small network
// dispatching the allocations costs more than the work.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../common/check_args.h"
#include "../common/layout.h"

namespace quantkern {

inline bool is_plain_cpu(const at::Tensor& x) { return x.is_cpu() && !at::isTensorSubclassLike(x); }

// dtype: what a float32 x becomes, if anything else.
inline at::Tensor new_result(const at::Tensor& x, std::optional<at::ScalarType> dtype) {
  const at::ScalarType wanted = result_dtype(x, dtype);
  if (is_plain_cpu(x) && x.is_non_overlapping_and_dense()) return new_strided(x.sizes(), x.strides(), x, wanted);
  return at::empty_like(x, x.options().dtype(wanted));
}

inline at::Tensor new_result_mask(const at::Tensor& x, bool wanted) {
  if (is_plain_cpu(x)) return new_mask(x, wanted);
  const c10::SymInt bytes = wanted ? (x.sym_numel() + 7) / 8 : c10::SymInt(0);
  return at::empty_symint({bytes}, x.options().dtype(at::kByte));
}

}  // namespace quantkern
