// The straight-through backward: the gradient where the mask has a 1, nothing elsewhere.
//
// Saved for it: one bit an element and the strides of y, or nothing at all where every gradient passes. A node of our
// own, not torch::autograd::Function: a call on a small tensor costs half as much.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <tuple>

namespace quantkern {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

bool needs_gradient(const at::Tensor& x);

// Runs forward(with_mask) -> (y, mask) below autograd and hangs the backward on y. An empty mask for a tensor that
// has elements means that every gradient passes.
template <class Forward>
at::Tensor straight_through(const at::Tensor& x, const Forward& forward);

// The part that does not depend on the forward.
void attach_straight_through(const at::Tensor& x, const at::Tensor& y, const at::Tensor& mask);

// The same for an x that forward(with_mask) -> mask writes over: the backward goes between x and its history.
template <class Forward>
at::Tensor straight_through_in_place(at::Tensor& x, const Forward& forward);

void check_in_place(const at::Tensor& x);
void attach_in_place(at::Tensor& x, const at::Tensor& mask);

template <class Forward>
at::Tensor straight_through_in_place(at::Tensor& x, const Forward& forward) {
  check_in_place(x);
  at::Tensor mask;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    mask = forward(needs_gradient(x));
  }
  attach_in_place(x, mask);
  return mask;
}

template <class Forward>
at::Tensor straight_through(const at::Tensor& x, const Forward& forward) {
  const bool with_mask = needs_gradient(x);
  at::Tensor y, mask;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    std::tie(y, mask) = forward(with_mask);
  }
  if (with_mask) attach_straight_through(x, y, mask);
  return y;
}

}  // namespace quantkern
