"""Rows of the inventory: signs, packed and not, and their products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import op_draws
import op_draws_binary as binary
import torch
from op_sample import Run, Sample, make_x
from op_spec import OPS, Bad, OpSpec, int32, to, vector
from torch import Tensor

from quantkern import Backend
from quantkern import functional as F

BINARIZE = OpSpec(
    name="binarize",
    schemas=("binarize", "binarize_forward"),
    samples=(
        Sample("vector", (67,), lambda x, backend: (F.binarize(x, backend=backend),)),
        Sample("whole_gradient", (3, 50), lambda x, backend: (F.binarize(x, clip_gradient=False, backend=backend),)),
        Sample("images", (4, 5, 6, 7), lambda x, backend: (F.binarize(x, backend=backend),)),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.binarize(torch.arange(3)), TypeError, "floating-point"),
        Bad(
            "integer_tensor_reference",
            lambda: F.binarize(torch.arange(3), backend=Backend.REFERENCE),
            TypeError,
            "floating-point",
        ),
    ),
    op_calls=lambda: _binarize_op_calls(),
    draws=(op_draws.binarize,),
)


def _fixed(run: Run) -> dict[str, Any]:
    """A sample whose result is not like x and has no gradient."""
    return {"run": run, "like_x": False, "differentiable": False}


def _pack(axis: int = -1, counts: bool = False) -> dict[str, Any]:
    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        packed = F.pack_signs(x, axis, counts=counts, backend=backend)
        return packed if isinstance(packed, tuple) else (packed,)

    return _fixed(run)


def _pack_unpack(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
    packed = F.pack_signs(x, backend=backend)
    assert isinstance(packed, Tensor)
    return (F.unpack_signs(packed, x.shape[-1], x.dtype, backend=backend),)


def packed_weights(*shape: int, axis: int = -1) -> Tensor:
    """The same packed weights for every backend."""
    packed = F.pack_signs(make_x(shape, seed=2), axis, backend=Backend.REFERENCE)
    assert isinstance(packed, Tensor)
    return packed


def _pack_x(x: Tensor, backend: Backend, axis: int = -1) -> Tensor:
    packed = F.pack_signs(x, axis, backend=backend)
    assert isinstance(packed, Tensor)
    return packed


def _matmul(rows: int, k: int, *, epilogue: bool = False, arranged: bool = False) -> dict[str, Any]:
    fixed = packed_weights(rows, k)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        weights = fixed.to(x.device)
        order = F.arrange_signs(weights) if arranged and backend in (Backend.AUTO, Backend.NATIVE) else None
        scale, bias = to(x, vector(rows, -1.3, 0.7), vector(rows, 0.1, 9.0)) if epilogue else (None, None)
        a = _pack_x(x, backend)
        return (F.binary_matmul(a, weights, k, scale=scale, bias=bias, arranged=order, backend=backend),)

    return _fixed(run)


def _thresholds(count: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Thresholds about the middle of the sums, every third channel flipped."""
    threshold = torch.linspace(low, high, count).round().to(torch.int32)
    flip = F.pack_signs(torch.where(torch.arange(count) % 3 == 1, 1.0, -1.0), backend=Backend.REFERENCE)
    assert isinstance(flip, Tensor)
    return threshold, flip


def _matmul_sign(rows: int, k: int) -> dict[str, Any]:
    weights, at = packed_weights(rows, k), _thresholds(rows, -9, 9)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        a, b = _pack_x(x, backend), weights.to(x.device)
        return (F.binary_matmul_sign(a, b, k, at[0].to(x.device), at[1].to(x.device), backend=backend),)

    return _fixed(run)


def _sign_linear(rows: int, k: int, bias: bool = False) -> dict[str, Any]:
    weight = make_x((rows, k), seed=2, edges=False)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        added = vector(rows, -2, 2).to(x) if bias else None
        return (F.sign_linear(x, weight.to(x), added, backend=backend),)

    return {"run": run, "like_x": False}


def _conv(outputs: int, channels: int, kernel: tuple[int, int], *geometry: int | tuple[int, int]) -> dict[str, Any]:
    weights = packed_weights(outputs, channels, *kernel, axis=1)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.binary_conv2d(x, weights.to(x.device), None, *geometry, backend=backend),)

    return _fixed(run)


def _conv_scaled() -> dict[str, Any]:
    weights = packed_weights(5, 33, 3, 3, axis=1)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        scale, bias, taps = to(x, vector(5, -1.3, 0.7), vector(5, 0.1, 9.0), weights)
        packed = _pack_x(x, backend, 1)
        assert taps is not None
        return (F.binary_conv2d(packed, taps, bias, padding=1, channels=33, scale=scale, backend=backend),)

    return _fixed(run)


def _conv_sign() -> dict[str, Any]:
    weights, at = packed_weights(40, 33, 3, 3, axis=1), _thresholds(40, -9, 9)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        packed, threshold, flip = _pack_x(x, backend, 1), at[0].to(x.device), at[1].to(x.device)
        return (F.binary_conv2d_sign(packed, weights.to(x.device), 33, threshold, flip, 1, 1, backend=backend),)

    return _fixed(run)


def _sign_conv2d(outputs: int, channels: int, kernel: int, *geometry: int, bias: bool = False) -> dict[str, Any]:
    weight = make_x((outputs, channels, kernel, kernel), seed=2, edges=False)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        added = vector(outputs, -2, 2).to(x) if bias else None
        return (F.sign_conv2d(x, weight.to(x), added, *geometry, backend=backend),)

    return {"run": run, "like_x": False}


def _pool(channels: int, *window: int) -> dict[str, Any]:
    _, flip = _thresholds(channels, 0, 0)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.packed_max_pool2d(_pack_x(x, backend, 1), flip.to(x.device), *window, backend=backend),)

    return _fixed(run)


PACK_SIGNS = OpSpec(
    name="pack_signs",
    schemas=("pack_signs", "pack_signs_counted", "unpack_signs"),
    samples=(
        Sample("rows", (5, 70), **_pack()),
        Sample("whole_words", (6, 128), **_pack()),
        Sample("one_word", (9, 3), **_pack()),
        Sample("counted", (7, 100), **_pack(counts=True)),
        Sample("first_axis", (45, 70), **_pack(0)),
        Sample("images", (2, 35, 9, 5), **_pack(1)),
        Sample("images_counted", (2, 64, 5, 7), **_pack(1, counts=True)),
        Sample("unpacked", (6, 75), run=_pack_unpack, like_x=False, differentiable=False),
    ),
    bad=(
        Bad("integer_tensor", lambda: F.pack_signs(torch.arange(3)), TypeError, "floating-point"),
        Bad("axis", lambda: F.pack_signs(torch.ones(3), 1), IndexError, "axis must lie in"),
        Bad("no_dimension", lambda: F.pack_signs(torch.tensor(1.0)), IndexError, "dimension|axis"),
        Bad("unpack_float", lambda: F.unpack_signs(torch.ones(2, 1), 3), TypeError, "int32"),
        Bad("unpack_int64", lambda: F.unpack_signs(torch.ones(2, 1).long(), 3), TypeError, "int32"),
        Bad("unpack_width", lambda: F.unpack_signs(int32(1, 2)[None], 3), ValueError, "1 words for k=3"),
        Bad("unpack_to_int", lambda: F.unpack_signs(int32(1)[None], 3, torch.int8), TypeError, "floating-point"),
    ),
    op_calls=lambda: _pack_op_calls(),
    draws=(binary.pack_signs, binary.unpack_signs),
)


BINARY_MATMUL = OpSpec(
    name="binary_matmul",
    schemas=("binary_matmul", "binary_matmul_into", "binary_matmul_sign", "arrange_signs", "sign_linear"),
    samples=(
        Sample("ragged", (5, 70), **_matmul(33, 70)),
        Sample("one_row", (1, 100), **_matmul(40, 100)),
        Sample("one_column", (9, 33), **_matmul(1, 33)),
        Sample("long", (17, 1100), **_matmul(97, 1100)),
        Sample("scaled", (70, 64), **_matmul(12, 64, epilogue=True)),
        Sample("arranged", (12, 130), **_matmul(100, 130, arranged=True)),
        Sample("signs", (10, 75), **_matmul_sign(41, 75)),
        Sample("layer", (7, 40), **_sign_linear(6, 40)),
        Sample("layer_bias", (2, 3, 33), **_sign_linear(5, 33, bias=True)),
    ),
    bad=(
        Bad("k", lambda: F.binary_matmul(_signs(2, 40), _signs(3, 70), 40), ValueError, "b must have rows of 2 words"),
        Bad("float", lambda: F.binary_matmul(torch.ones(2, 2), _signs(3, 40), 40), TypeError, "a must hold packed"),
        Bad("int64", lambda: F.binary_matmul(_signs(2, 40).long(), _signs(3, 40), 40), TypeError, "int32"),
        Bad("vector", lambda: F.binary_matmul(_signs(40), _signs(3, 40), 40), ValueError, "2 dimensions"),
        Bad("stepped", lambda: F.binary_matmul(_signs(4, 40)[::2], _signs(3, 40), 40), ValueError, r"\.contiguous\(\)"),
        Bad("padding", lambda: F.binary_matmul(_signs(2, 64), _signs(3, 40), 40), ValueError, "a has padding bits"),
        Bad(
            "padding_reference",
            lambda: F.binary_matmul(_signs(2, 40), _signs(2, 64), 40, backend=Backend.REFERENCE),
            ValueError,
            "b has padding bits",
        ),
        Bad("negative_k", lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), -1), ValueError, "k must lie in"),
        Bad(
            "scale",
            lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), 40, scale=torch.ones(2)),
            ValueError,
            "scale must be .* of 3 values",
        ),
        Bad(
            "arranged",
            lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), 40, arranged=F.arrange_signs(_signs(33, 40))),
            ValueError,
            "arranged must be",
        ),
        Bad(
            "threshold",
            lambda: F.binary_matmul_sign(_signs(2, 40), _signs(3, 40), 40, torch.zeros(3), int32(0)),
            TypeError,
            "threshold must be",
        ),
        Bad(
            "out",
            lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40), 40, out=torch.empty(3, 2)),
            ValueError,
            r"out must be .* \[2, 3\], got shape \[3, 2\]",
        ),
        Bad("features", lambda: F.binary_linear(torch.ones(2, 41), _signs(3, 40), 40), ValueError, "40 features"),
        Bad("layer", lambda: F.sign_linear(torch.ones(2, 5), torch.ones(3, 4)), ValueError, r"\[2, 5\] and \[3, 4\]"),
        Bad("device", lambda: F.binary_matmul(_signs(2, 40), _signs(3, 40).to("meta"), 40), ValueError, "b is on meta"),
    ),
    op_calls=lambda: _matmul_op_calls(),
    draws=(binary.binary_matmul, binary.binary_matmul_sign, binary.binary_linear, binary.sign_linear),
)


BINARY_CONV2D = OpSpec(
    name="binary_conv2d",
    schemas=("binary_conv2d", "binary_conv2d_sign", "sign_conv2d"),
    samples=(
        Sample("padded", (2, 35, 7, 6), **_conv(9, 35, (3, 3), 1, 1)),
        Sample("strided", (1, 64, 9, 9), **_conv(40, 64, (3, 3), 2, 1)),
        Sample("dilated", (2, 3, 9, 8), **_conv(4, 3, (3, 2), (2, 1), (2, 1), (2, 3))),
        Sample("pointwise", (2, 33, 5, 4), **_conv(34, 33, (1, 1))),
        Sample("one_pixel", (1, 20, 1, 1), **_conv(3, 20, (3, 3), 1, 1)),
        Sample("wide_padding", (1, 8, 3, 3), **_conv(5, 8, (5, 5), 1, 4)),
        Sample("scaled", (2, 33, 6, 6), **_conv_scaled()),
        Sample("signs", (2, 33, 6, 5), **_conv_sign()),
        Sample("layer", (2, 5, 6, 6), **_sign_conv2d(4, 5, 3, 1, 1)),
        Sample("layer_bias", (2, 33, 6, 7), **_sign_conv2d(3, 33, 3, 2, 1, bias=True)),
    ),
    bad=(
        Bad("groups", lambda: F.binary_conv2d(torch.ones(1, 4, 5, 5), _taps(2, 4), groups=2), ValueError, "groups=2"),
        Bad("dims", lambda: F.binary_conv2d(torch.ones(4, 5, 5), _taps(2, 4)), ValueError, r"got shape \[4, 5, 5\]"),
        Bad("channels", lambda: F.binary_conv2d(torch.ones(1, 40, 5, 5), _taps(2, 4)), ValueError, "2 words for k=40"),
        Bad("packed", lambda: F.binary_conv2d(_signs(1, 5, 5, 4), _taps(2, 4)), ValueError, "channels="),
        Bad("small", lambda: F.binary_conv2d(torch.ones(1, 4, 2, 2), _taps(2, 4)), ValueError, "larger than the image"),
        Bad("stride", lambda: F.binary_conv2d(torch.ones(1, 4, 5, 5), _taps(2, 4), None, 0), ValueError, "stride must"),
        Bad(
            "layer",
            lambda: F.sign_conv2d(torch.ones(1, 4, 5, 5), torch.ones(2, 3, 3, 3)),
            ValueError,
            r"\[1, 4, 5, 5\] and \[2, 3, 3, 3\]",
        ),
    ),
    op_calls=lambda: _conv_op_calls(),
    draws=(binary.binary_conv2d, binary.binary_conv2d_sign, binary.sign_conv2d),
)


PACKED_MAX_POOL2D = OpSpec(
    name="packed_max_pool2d",
    schemas=("packed_max_pool2d",),
    samples=(
        Sample("halved", (2, 35, 6, 8), **_pool(35, 2)),
        Sample("overlapping", (1, 70, 7, 7), **_pool(70, 3, 2, 1)),
        Sample("ragged", (3, 5, 5, 7), **_pool(5, 2, 2)),
    ),
    bad=(
        Bad("padding", lambda: F.packed_max_pool2d(_signs(1, 5, 5, 4), int32(0), 2, 2, 2), ValueError, "half"),
        Bad("flip", lambda: F.packed_max_pool2d(_signs(1, 5, 5, 4), int32(0, 0), 2), ValueError, "flip must be"),
        Bad("float", lambda: F.packed_max_pool2d(torch.ones(1, 5, 5, 1), int32(0), 2), TypeError, "packed signs"),
        Bad("large", lambda: F.packed_max_pool2d(_signs(1, 5, 5, 4), int32(0), 7), ValueError, "larger than"),
    ),
    op_calls=lambda: _pool_op_calls(),
    draws=(binary.packed_max_pool2d,),
)


def _signs(*shape: int) -> Tensor:
    packed = F.pack_signs(torch.ones(shape))
    assert isinstance(packed, Tensor)
    return packed


def _taps(outputs: int, channels: int) -> Tensor:
    return _signs(outputs, 3, 3, channels)


def _binarize_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(4, 6, requires_grad=True)
    for clip in (False, True):
        yield OPS.binarize.default, (x, clip)
        yield OPS.binarize_forward.default, (x.detach(), clip)


def _pack_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    x = torch.randn(3, 40, 5)
    for axis in (-1, 1):
        yield OPS.pack_signs.default, (x, axis)
        yield OPS.pack_signs_counted.default, (x, axis)
    yield OPS.unpack_signs.default, (_signs(3, 40), 40, torch.float16)


def _matmul_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    a, b = _signs(3, 40), _signs(5, 40)
    yield OPS.arrange_signs.default, (b,)
    yield OPS.binary_matmul.default, (a, b, 40, torch.ones(5), torch.ones(5), F.arrange_signs(b))
    yield OPS.binary_matmul_into.default, (a, b, 40, torch.ones(5), None, None, torch.empty(3, 5))
    yield OPS.binary_matmul_sign.default, (a, b, 40, int32(*range(5)), int32(3))
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 7), (4, 7), (4,)))
    yield OPS.sign_linear.default, (x, weight, bias)
    yield OPS.sign_linear.default, (x.detach(), weight)


def _conv_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    geometry: tuple[Any, ...] = ([2, 1], [1, 1], [1, 1])
    x, weight = _signs(2, 6, 5, 40), _taps(5, 40)
    yield OPS.binary_conv2d.default, (x, weight, 40, *geometry, torch.ones(5), torch.ones(5))
    yield OPS.binary_conv2d.default, (x, weight, 40, *geometry, None, None, F.arrange_signs(weight), True)
    yield OPS.binary_conv2d_sign.default, (x, weight, 40, *geometry, int32(*range(5)), int32(3))
    images, kernels, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 6, 5), (4, 3, 3, 3), (4,)))
    yield OPS.sign_conv2d.default, (images, kernels, bias, *geometry)
    last = images.detach().to(memory_format=torch.channels_last).requires_grad_()
    yield OPS.sign_conv2d.default, (last, kernels, None, *geometry)


def _pool_op_calls() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    yield OPS.packed_max_pool2d.default, (_signs(2, 6, 5, 40), int32(3, 0), [3, 3], [2, 1], [1, 0])
