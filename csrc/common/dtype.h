// torch's scalar types as the kernels' DType.
#pragma once

#include <ATen/core/Tensor.h>

#include "../numerics/dtype.h"

namespace quantkern {

inline DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kHalf:
      return DType::kHalf;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kDouble:
      return DType::kDouble;
    default:
      TORCH_CHECK_TYPE(false, "x must be a floating-point tensor (float32, float16, bfloat16, on the CPU also ",
                       "float64), got ", x.scalar_type(), "; convert it with x.float()");
  }
}

}  // namespace quantkern
