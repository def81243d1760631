// What the fake-quantize operations on the CPU share.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "channel_params.h"

namespace quantkern::cpu {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// Whether the operation is still the identity.
bool is_delayed(const std::optional<at::Tensor>& step, int64_t start_step);

float zero_point_at(const at::Tensor& zero_point, int64_t channel);

// out = fake_quantize(in), both dense with the same strides; in may be out, and out of a 16-bit type where in is
// float32. An empty mask is not written.
void run_fake_quantize(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask,
                       const ChannelParams& params);

// out = in within [lower, upper], both dense with the same strides; in may be out. An empty mask is not written.
void run_clip(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask, double lower, double upper);

// out = in, and every gradient passes.
void run_identity(const at::Tensor& in, const at::Tensor& out, const at::Tensor& mask);

// The parameters of lsq; a scale that is not positive and finite is an error.
void set_lsq_params(PreparedParams& params, const Layout& layout, const at::Tensor& scale,
                    const std::optional<at::Tensor>& zero_point);

}  // namespace quantkern::cpu
