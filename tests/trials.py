"""One randomly drawn call of an operation, and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from op_sample import Sample
from strategies import Draw, chance, laid_out, pick
from torch import Tensor

from quantkern import _C, Backend

REFUSALS = (ValueError, TypeError, IndexError)
"""What an operation may answer to arguments that it cannot take; anything else is a failure."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Outcome:
    """What a call gave: every tensor it returned or wrote, the gradient that was given to it, and those it gave."""

    results: tuple[Tensor, ...]
    above: Tensor | None = None
    gradients: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Trial:
    """A way to call an operation, what to call it with, and what its outcome may be.

    parameters: further tensors that receive a gradient. oracle: checks an outcome in float64. exact: whether results
    are the reference's to the last bit; exact_gradient: the same of the gradient of x.
    """

    sample: Sample
    x: Tensor
    oracle: Callable[[Outcome], None]
    parameters: tuple[Tensor, ...] = ()
    exact: bool = True
    exact_gradient: bool = True

    def describe(self) -> str:
        x = self.x
        return (
            f"{self.sample.name}: x {str(x.dtype).removeprefix('torch.')} {list(x.shape)} with strides {x.stride()} "
            f"from {x.storage_offset()}"
        )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the last bit, signs of zeros included; any NaN is NaN."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    whole = INTEGERS[one.element_size()]
    bits = [t.detach().contiguous().resolve_neg().view(whole) for t in (one, other)]
    return torch.equal(*bits) or bool(((bits[0] == bits[1]) | (one.isnan() & other.isnan())).all())


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """``same_bits`` but for the signs of zeros: a gradient that autograd adds to 0 loses the sign of its zeros."""
    return same_bits(one + 0.0, other + 0.0)


def forward(trial: Trial, backend: Backend, needs_gradient: bool) -> tuple[Tensor, Outcome | Exception]:
    """The leaf that was given, in x's own memory, and what came of it."""
    leaf = trial.x.detach()
    if needs_gradient:
        leaf.requires_grad_()
    try:
        return leaf, Outcome(trial.sample.run(leaf, backend))
    except REFUSALS as error:
        return leaf, error


def backward(trial: Trial, leaf: Tensor, outcome: Outcome, above: Tensor, fresh: bool) -> Outcome:
    """fresh: the operation receives a gradient that nobody else holds, and may write over it."""
    y = outcome.results[0]
    given = (leaf, *trial.parameters)
    gradients = torch.autograd.grad(y * 1.0 if fresh else y, given, above)
    for gradient, to in zip(gradients, given, strict=True):
        assert gradient.shape == to.shape and gradient.dtype == to.dtype
    return Outcome(tuple(r.detach() for r in outcome.results), above, gradients)


def check(draw: Draw, trial: Trial, backend: Backend = Backend.NATIVE) -> bool:
    """Runs a trial on a backend and the reference. Returns whether the call was valid; a difference is an error."""
    if draw.device.type == "cpu":
        _C.set_cpu_capability(pick(draw, _CAPABILITIES))
    needs_gradient = trial.sample.differentiable and not chance(draw, 20)
    before = trial.x.clone()
    leaf, got = forward(trial, backend, needs_gradient)
    other, expected = forward(trial, Backend.REFERENCE, needs_gradient)
    if isinstance(got, Exception) or isinstance(expected, Exception):
        what = [repr(one) if isinstance(one, Exception) else "takes it" for one in (got, expected)]
        assert type(got) is type(expected), f"{backend.value}: {what[0]}, reference: {what[1]}"
        return False
    y = got.results[0]
    if trial.sample.like_x:
        assert y.stride() == torch.empty_like(trial.x).stride(), "y has other strides than torch.empty_like(x)"
    if needs_gradient and y.requires_grad:
        above = laid_out(draw, tuple(y.shape), y.dtype, finite=chance(draw, 60))
        kept, fresh = above.clone(), chance(draw, 40)
        got = backward(trial, leaf, got, above, fresh)
        expected = backward(trial, other, expected, above, False)
        assert same_bits(above, kept), "the gradient that was given has changed"
    assert same_bits(trial.x, before), "x has changed"
    assert len(got.results) == len(expected.results)
    for i, (one, want) in enumerate(zip(got.results, expected.results, strict=True)):
        assert one.dtype == want.dtype and one.shape == want.shape
        same = same_numbers if i else same_bits  # the sign of a minimum that is 0 depends on the order
        assert not trial.exact or same(one, want), f"result {i} is not the reference's: {_difference(one, want)}"
    if got.gradients and trial.exact_gradient:
        one, want = got.gradients[0], expected.gradients[0]
        assert same_numbers(one, want), f"the gradient of x is not the reference's: {_difference(one, want)}"
    trial.oracle(got)
    return True


_CAPABILITIES = tuple(reversed(_C.supported_cpu_capabilities()))


def _difference(one: Tensor, other: Tensor) -> str:
    one, other = (t.detach().contiguous().resolve_neg().reshape(-1) for t in (one, other))
    unequal = (one != other) & ~(one.isnan() & other.isnan()) | (torch.signbit(one) != torch.signbit(other))
    at = int(unequal.int().argmax())
    return f"{int(unequal.sum())} of {one.numel()}; element {at} is {one[at].item()!r}, not {other[at].item()!r}"
