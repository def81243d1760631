"""All weights of a model in one operation: ``quantkern.functional.fake_quantize_weights`` and ``lsq_weights``.

A list may mix shapes, dtypes and devices. The compiled kernels take all tensors of a device together; what they do
not have is a loop over the operation on one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkern import reference
from quantkern.affine import fake_quantize_weight
from quantkern.arguments import check_axis, check_narrow
from quantkern.backend import Backend, resolve
from quantkern.learned_step import lsq

_FAKE_QUANTIZE_WEIGHTS = torch.ops.quantkern.fake_quantize_weights.default
_LSQ_WEIGHTS = torch.ops.quantkern.lsq_weights.default


def plain_axes(xs: Sequence[Tensor], axes: Sequence[int | None]) -> list[int]:
    """The axes as the operators have them: counted from the front, -1 for a whole tensor."""
    return [-1 if axis is None else check_axis(x, axis) for x, axis in zip(xs, axes, strict=True)]  # type: ignore[misc]


def _per_device(
    xs: Sequence[Tensor],
    backend: Backend,
    run: Callable[[list[int] | None], list[Tensor]],
    one: Callable[[int, Backend], Tensor],
) -> list[Tensor]:
    """``run`` on the tensors of each device that has compiled kernels (None: all), else ``one`` after the other."""
    places: dict[torch.device, list[int]] = {}
    for i, x in enumerate(xs):
        places.setdefault(x.device, []).append(i)
    if len(places) == 1 and resolve(xs[0], backend) is Backend.NATIVE:
        return run(None)
    results: dict[int, Tensor] = {}
    for indices in places.values():
        chosen = resolve(xs[indices[0]], backend)
        native = chosen is Backend.NATIVE
        results.update(zip(indices, run(indices) if native else [one(i, chosen) for i in indices], strict=True))
    return [results[i] for i in range(len(xs))]


def _chosen(lists: Sequence[Sequence[Any]], indices: list[int] | None) -> list[list[Any]]:
    return [list(values) if indices is None else [values[i] for i in indices] for values in lists]


def _same_length(xs: Sequence[Tensor], **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if len(values) != len(xs):
            raise ValueError(f"{name} must have one entry for each of the {len(xs)} tensors in xs, got {len(values)}")


def fake_quantize_weights(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    symmetric: Sequence[bool],
    axes: Sequence[int | None] | None = None,
    *,
    steps: Sequence[Tensor | None] | None = None,
    start_steps: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
) -> list[Tensor]:
    """``fake_quantize_weight`` of many tensors in one operation, with the same results and gradients to the last bit.

    On the CPU there is one parallel region for all of them, cut by elements and not by tensors; on CUDA one launch a
    pass for about 30 of them. Every result has a backward of its own.

    Args:
        xs: floating-point tensors of any shapes, dtypes and devices.
        scales, zero_points: what each of them writes, no tensor twice.
        quant_min, quant_max, symmetric, axes, steps, start_steps: one entry a tensor, as in ``fake_quantize_weight``;
            None: per tensor, and from the start.
        dtype: float16 or bfloat16: what float32 tensors become in the same pass, rounded once more, as an autocast
            region needs them; their gradients are float32. None: every result has the dtype of its x.
        backend: as in ``fake_quantize``.

    Returns:
        One tensor for each x.

    Raises:
        TypeError, ValueError, IndexError: as ``fake_quantize_weight``, lists of different lengths, another dtype.

    >>> xs = [torch.tensor([-1.27, 0.5]), torch.tensor([[2.54], [1.27]])]
    >>> scales = [torch.empty(()), torch.empty(2)]
    >>> zero_points = [torch.empty_like(scale, dtype=torch.int32) for scale in scales]
    >>> rules = [-127, -127], [127, 127], [True, True], [None, 0]
    >>> ys = fake_quantize_weights(xs, scales, zero_points, *rules)
    >>> [y.shape for y in ys], scales[1].mul(100).round().tolist()
    ([torch.Size([2]), torch.Size([2, 1])], [2.0, 1.0])
    """
    axes = [None] * len(xs) if axes is None else axes
    steps = [None] * len(xs) if steps is None else steps
    start_steps = [0] * len(xs) if start_steps is None else start_steps
    _same_length(
        xs, scales=scales, zero_points=zero_points, quant_min=quant_min, quant_max=quant_max, symmetric=symmetric,
        axes=axes, steps=steps, start_steps=start_steps,
    )  # fmt: skip
    counted = plain_axes(xs, axes)
    check_narrow(dtype)
    lists = (scales, zero_points, quant_min, quant_max, symmetric, counted, steps, start_steps)

    def run(indices: list[int] | None) -> list[Tensor]:
        return _FAKE_QUANTIZE_WEIGHTS(*_chosen((xs, *lists), indices), dtype)  # type: ignore[no-any-return]

    def one(i: int, chosen: Backend) -> Tensor:
        return fake_quantize_weight(
            xs[i], scales[i], zero_points[i], quant_min[i], quant_max[i], symmetric[i], axes[i],
            step=steps[i], start_step=start_steps[i], dtype=dtype, backend=chosen,
        )  # fmt: skip

    return _per_device(xs, backend, run, one)


def lsq_weights(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    quant_min: Sequence[int],
    quant_max: Sequence[int],
    axes: Sequence[int | None] | None = None,
    grad_scales: Sequence[float | None] | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = Backend.AUTO,
) -> list[Tensor]:
    """``lsq`` of many tensors in one operation, with the same results and gradients to the last bit.

    Args:
        xs: floating-point tensors of any shapes, dtypes and devices.
        scales: the step size of each, float32, as in ``lsq``; there is no learned zero point.
        quant_min, quant_max, axes, grad_scales: one entry a tensor, as in ``lsq``; None: per tensor, and the paper's
            factor.
        dtype: as in ``fake_quantize_weights``.
        backend: as in ``fake_quantize``.

    Returns:
        One tensor for each x, each with a backward of its own.

    Raises:
        TypeError, ValueError, IndexError: as ``lsq``, lists of different lengths, another dtype.

    >>> xs = [torch.tensor([-0.9, 0.3]), torch.tensor([0.8, 9.0])]
    >>> [y.tolist() for y in lsq_weights(xs, [torch.tensor(0.5)] * 2, [-2, -2], [1, 1])]
    [[-1.0, 0.5], [0.5, 0.5]]
    """
    axes = [None] * len(xs) if axes is None else axes
    grad_scales = [None] * len(xs) if grad_scales is None else grad_scales
    _same_length(
        xs, scales=scales, quant_min=quant_min, quant_max=quant_max, axes=axes, grad_scales=grad_scales
    )  # fmt: skip
    counted = plain_axes(xs, axes)
    factors = [
        reference.lsq_grad_scale(x, high, axis if axis >= 0 else None) if factor is None else factor
        for x, high, axis, factor in zip(xs, quant_max, counted, grad_scales, strict=True)
    ]
    check_narrow(dtype)
    lists = (scales, quant_min, quant_max, factors, counted)

    def run(indices: list[int] | None) -> list[Tensor]:
        return _LSQ_WEIGHTS(*_chosen((xs, *lists), indices), dtype)  # type: ignore[no-any-return]

    def one(i: int, chosen: Backend) -> Tensor:
        rule = (quant_min[i], quant_max[i], axes[i], factors[i])
        return lsq(xs[i], scales[i], *rule, dtype=dtype, backend=chosen)

    return _per_device(xs, backend, run, one)
