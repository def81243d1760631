// How kernels see a tensor: as `outer` x `channels` x `inner` elements in the order they lie in memory.
//
// Any tensor whose elements fill one block of memory (contiguous, channels_last, permuted) is taken as it lies;
// anything else (slices, expanded tensors) is first copied into a dense tensor. Per tensor there is one channel.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <optional>
#include <tuple>

namespace quantkern {

struct Layout {
  int64_t outer, channels, inner;
};

// dense: non-overlapping and dense; axis already within [0, dim).
inline Layout layout_of(const at::Tensor& dense, std::optional<int64_t> axis) {
  const int64_t numel = dense.numel();
  if (!axis.has_value() || dense.size(*axis) == 1 || numel == 0) return {1, 1, numel};
  const int64_t channels = dense.size(*axis), inner = dense.stride(*axis);
  return {numel / (channels * inner), channels, inner};
}

// Kernels allocate below every dispatch key that matters: on the CPU straight from the allocator, which halves the
// cost of a call on a small tensor.
inline at::Tensor new_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::Tensor& like,
                              at::ScalarType dtype) {
  if (like.is_cpu()) return at::detail::empty_strided_cpu(sizes, strides, dtype);
  return at::empty_strided(sizes, strides, like.options().dtype(dtype));
}
inline at::Tensor new_strided(at::IntArrayRef sizes, at::IntArrayRef strides, const at::Tensor& like) {
  return new_strided(sizes, strides, like, like.scalar_type());
}

// x as the kernels read it and the tensor they write. A sparse view is copied into the output and worked on in
// place, so that it costs no third tensor.
struct DenseInOut {
  at::Tensor in, out;
};
inline DenseInOut dense_in_out(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense()) return {x, new_strided(x.sizes(), x.strides(), x)};
  const at::Tensor out = at::empty_like(x);
  out.copy_(x);
  return {out, out};
}

// x where it is dense, else a copy with the strides of torch.empty_like.
inline at::Tensor as_dense(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() ? x : at::empty_like(x).copy_(x);
}

// x and an output of a type of its own, where there is nothing in it to work on.
inline DenseInOut dense_in_out(const at::Tensor& x, at::ScalarType dtype) {
  if (dtype == x.scalar_type()) return dense_in_out(x);
  const at::Tensor in = as_dense(x);
  return {in, new_strided(in.sizes(), in.strides(), in, dtype)};
}

// The same for an output of given dense strides, such as those of the tensor whose gradient x is.
inline DenseInOut dense_in_out(const at::Tensor& x, at::IntArrayRef strides) {
  const at::Tensor out = new_strided(x.sizes(), strides, x);
  if (x.strides() == strides) return {x, out};
  out.copy_(x);
  return {out, out};
}

// grad with the strides of a dense tensor of its shape.
inline at::Tensor in_layout_of(const at::Tensor& grad, const at::Tensor& dense) {
  if (grad.strides() == dense.strides()) return grad;
  const at::Tensor moved = new_strided(grad.sizes(), dense.strides(), grad);
  moved.copy_(grad);
  return moved;
}

inline at::Tensor new_mask(const at::Tensor& x, bool with_mask) {
  const int64_t bytes = with_mask ? (x.numel() + 7) / 8 : 0;
  if (x.is_cpu()) return at::detail::empty_cpu({bytes}, at::kByte);
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

}  // namespace quantkern
