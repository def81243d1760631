// The backward of the learned step size, for whoever has computed y.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace quantkern {

using MaybeAxis = std::optional<int64_t>;

struct LsqSettings {
  int64_t quant_min, quant_max;
  double grad_scale;
  MaybeAxis axis;
};

// Hangs the backward on y. zero_point: undefined where none is learned.
void attach_lsq(const at::Tensor& x, const at::Tensor& y, const at::Tensor& scale, const at::Tensor& zero_point,
                const LsqSettings& settings);

}  // namespace quantkern
