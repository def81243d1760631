"""How the functions of binary networks are called at random, as ``op_draws`` does for the others."""

from __future__ import annotations

import math

import oracles
import strategies as st
import torch
from op_draws import dtype_of, nothing
from op_sample import Sample
from strategies import Draw, Grid, chance, pick
from torch import Tensor
from trials import Outcome, Trial

from quantkern import Backend, reference
from quantkern import functional as F


def pack_signs(draw: Draw) -> Trial:
    dtype, shape = dtype_of(draw), st.shapes(draw)
    axis = draw.integer(-max(1, len(shape)), max(0, len(shape) - 1))
    x, counts = st.laid_out(draw, shape, dtype), chance(draw, 40)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        packed = F.pack_signs(x, axis, counts=counts, backend=backend)
        return packed if isinstance(packed, tuple) else (packed,)

    sample = Sample("pack_signs", shape, run, like_x=False, differentiable=False)
    return Trial(sample, x, nothing)


def unpack_signs(draw: Draw) -> Trial:
    k, dtype = st.lengths(draw), dtype_of(draw)
    shape = st.shapes(draw, most_rank=3)
    x = st.packed(draw, shape, k)
    asked = k + (1 if chance(draw, 3) else 0)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.unpack_signs(x, asked, dtype, backend=backend),)

    sample = Sample("unpack_signs", tuple(x.shape), run, like_x=False, differentiable=False)
    return Trial(sample, x, nothing)


def factors(draw: Draw, count: int) -> Tensor | None:
    """A scale or a bias of the outputs, or none."""
    if chance(draw, 50):
        return None
    return st.numbers(draw, count, torch.float32, Grid(pick(draw, (1.0, 0.01, 1e-30))))


def thresholds(draw: Draw, count: int, most: int) -> tuple[Tensor, Tensor]:
    """Thresholds about the middle, beyond the ends, at the ends of int32; and flips."""
    found = torch.tensor([draw.integer(-most - 2, most + 2) for _ in range(min(count, 5))] * (count // 5 + 1))[:count]
    if count and chance(draw, 10):
        found[0] = pick(draw, (-(1 << 31), (1 << 31) - 1))
    return found.to(draw.device, torch.int32), st.packed(draw, (), count, spoil=False)


def rows(draw: Draw) -> int:
    return pick(draw, (1, 2, 3, 7, 8, 9, 16, 17, 33, 65, 0))


def epilogue(dot: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    dot = dot if scale is None else dot * scale.double()
    return dot if bias is None else dot + bias.double()


def epilogue_error(dot: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    size = dot.abs() if scale is None else (dot * scale.double()).abs()
    return (size if bias is None else size + bias.double().abs()) * oracles.EPS + oracles.SMALLEST


def assert_dots(got: Tensor, dot: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    """Exact without scale and bias; infinities of theirs may meet on the way."""
    want, error = epilogue(dot, scale, bias), epilogue_error(dot, scale, bias)
    product = dot if scale is None else dot * scale.double()
    over = torch.isfinite(product) & (product.abs() > oracles.LARGEST) & torch.isfinite(want)
    error = torch.where(over | ~torch.isfinite(want), torch.inf, error if scale is not None or bias is not None else 0)
    oracles.assert_near(got, want, error, "y")


def binary_matmul(draw: Draw) -> Trial:
    k, m, n = st.lengths(draw), rows(draw), rows(draw)
    x, weights = st.packed(draw, (m,), k), st.packed(draw, (n,), k)
    scale, bias = factors(draw, n), factors(draw, n)
    arranges, into = chance(draw, 40) and weights.is_contiguous(), chance(draw, 20)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        order = F.arrange_signs(weights) if arranges and backend is Backend.NATIVE else None
        out = x.new_full((m, n), 7, dtype=torch.float32) if into else None
        found = F.binary_matmul(x, weights, k, scale=scale, bias=bias, arranged=order, out=out, backend=backend)
        return (found,)

    def oracle(outcome: Outcome) -> None:
        a, b = (reference.unpack_signs(t.contiguous(), k, torch.float64) for t in (x, weights))
        assert_dots(outcome.results[0], a @ b.t(), scale, bias)

    return Trial(Sample("binary_matmul", (m, k), run, like_x=False, differentiable=False), x, oracle)


def binary_linear(draw: Draw) -> Trial:
    k, n, dtype = st.lengths(draw), rows(draw), dtype_of(draw)
    shape = (*st.shapes(draw, most_rank=2), k)
    x = st.laid_out(draw, shape, dtype) if chance(draw, 70) else st.packed(draw, shape[:-1], k)
    weights, scale, bias = st.packed(draw, (n,), k), factors(draw, n), factors(draw, n)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.binary_linear(x, weights, k, bias, scale=scale, backend=backend),)

    def oracle(outcome: Outcome) -> None:
        b = reference.unpack_signs(weights, k, torch.float64)
        if x.is_floating_point():
            a = reference.binarize(x.detach().double())
        else:
            a = reference.unpack_signs(x.contiguous(), k, torch.float64)
        assert_dots(outcome.results[0], a @ b.t(), scale, bias)

    return Trial(Sample("binary_linear", shape, run, like_x=False, differentiable=False), x, oracle)


def binary_matmul_sign(draw: Draw) -> Trial:
    k, m, n = st.lengths(draw), rows(draw), rows(draw)
    x, weights = st.packed(draw, (m,), k), st.packed(draw, (n,), k)
    threshold, flip = thresholds(draw, n, k)
    arranges = chance(draw, 40) and weights.is_contiguous()

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        order = F.arrange_signs(weights) if arranges and backend is Backend.NATIVE else None
        return (F.binary_matmul_sign(x, weights, k, threshold, flip, arranged=order, backend=backend),)

    def oracle(outcome: Outcome) -> None:
        a, b = (reference.unpack_signs(t.contiguous(), k, torch.float64) for t in (x, weights))
        assert_signs(outcome.results[0], a @ b.t(), threshold, flip)

    return Trial(Sample("binary_matmul_sign", (m, k), run, like_x=False, differentiable=False), x, oracle)


def assert_signs(got: Tensor, dot: Tensor, threshold: Tensor, flip: Tensor) -> None:
    """The packed signs of sums along the last axis."""
    count = dot.shape[-1]
    want = (dot >= threshold.double()) ^ (reference.unpack_signs(flip, count) > 0)
    assert torch.equal(reference.unpack_signs(got, count) > 0, want)


def images(draw: Draw) -> tuple[tuple[int, int, int, int], int, tuple[int, int]]:
    """N, C, H, W, the number of kernels and their size."""
    channels = pick(draw, (3, 1, 2, 31, 32, 33, 64, 65))
    shape = (pick(draw, (1, 2, 3, 0)), channels, draw.integer(1, 8), draw.integer(1, 8))
    return shape, pick(draw, (1, 2, 5, 8, 31, 33)), (pick(draw, (3, 1, 2, 5)), pick(draw, (3, 1, 2, 5)))


def packed_images(draw: Draw, shape: tuple[int, int, int, int]) -> Tensor:
    return st.packed(draw, (shape[0], *shape[2:]), shape[1])


def convolved(x: Tensor, weight: Tensor, channels: int, geometry: tuple[tuple[int, int], ...]) -> Tensor:
    """Sums [N, O, H, W] in float64 of packed or real images and packed kernels."""
    if x.is_floating_point():
        a = reference.binarize(x.detach().double())
    else:
        a = reference.unpack_signs(x.contiguous(), channels, torch.float64).permute(0, 3, 1, 2)
    b = reference.unpack_signs(weight.contiguous(), channels, torch.float64).permute(0, 3, 1, 2)
    stride, padding, dilation = geometry
    return torch.nn.functional.conv2d(a, b, None, stride, padding, dilation)


def binary_conv2d(draw: Draw) -> Trial:
    shape, count, kernel = images(draw)
    channels, dtype = shape[1], dtype_of(draw)
    x = st.laid_out(draw, shape, dtype) if chance(draw, 60) else packed_images(draw, shape)
    weights, geometry = st.packed(draw, (count, *kernel), channels), st.geometries(draw, kernel)
    scale, bias, arranges = factors(draw, count), factors(draw, count), chance(draw, 40) and weights.is_contiguous()

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        order = F.arrange_signs(weights) if arranges and backend is Backend.NATIVE else None
        more = {"channels": None if x.is_floating_point() else channels, "scale": scale, "arranged": order}
        return (F.binary_conv2d(x, weights, bias, *geometry, **more, backend=backend),)

    def oracle(outcome: Outcome) -> None:
        vectors = [None if v is None else v.view(-1, 1, 1) for v in (scale, bias)]
        assert_dots(outcome.results[0], convolved(x, weights, channels, geometry), *vectors)

    return Trial(Sample("binary_conv2d", shape, run, like_x=False, differentiable=False), x, oracle)


def binary_conv2d_sign(draw: Draw) -> Trial:
    shape, count, kernel = images(draw)
    x, channels = packed_images(draw, shape), shape[1]
    weights, geometry = st.packed(draw, (count, *kernel), channels), st.geometries(draw, kernel)
    threshold, flip = thresholds(draw, count, channels * math.prod(kernel))
    arranges = chance(draw, 40) and weights.is_contiguous()

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        order = F.arrange_signs(weights) if arranges and backend is Backend.NATIVE else None
        found = F.binary_conv2d_sign(x, weights, channels, threshold, flip, *geometry, arranged=order, backend=backend)
        return (found,)

    def oracle(outcome: Outcome) -> None:
        dot = convolved(x, weights, channels, geometry).movedim(1, -1)
        assert_signs(outcome.results[0], dot, threshold, flip)

    return Trial(Sample("binary_conv2d_sign", shape, run, like_x=False, differentiable=False), x, oracle)


def packed_max_pool2d(draw: Draw) -> Trial:
    words = draw.integer(1, 4)
    shape = (pick(draw, (1, 2, 0)), draw.integer(1, 8), draw.integer(1, 8))
    x, flip = st.packed(draw, shape, 32 * words), st.packed(draw, (), 32 * words, spoil=False)
    kernel, stride = ((draw.integer(1, 4), draw.integer(1, 4)) for _ in range(2))
    padding = (draw.integer(0, 2), draw.integer(0, 2))
    strides = stride if chance(draw, 70) else None

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.packed_max_pool2d(x, flip, kernel, strides, padding, backend=backend),)

    def oracle(outcome: Outcome) -> None:
        signs = reference.unpack_signs(x.contiguous(), 32 * words, torch.float64).permute(0, 3, 1, 2)
        turned = reference.unpack_signs(flip, 32 * words, torch.float64).view(-1, 1, 1)
        # Where flip has a 1 the least sign of the window, else the greatest.
        pooled = torch.nn.functional.max_pool2d(-signs * turned, kernel, strides, padding)
        want = (-pooled * turned).permute(0, 2, 3, 1)
        assert torch.equal(reference.unpack_signs(outcome.results[0], 32 * words, torch.float64), want)

    return Trial(Sample("packed_max_pool2d", shape, run, like_x=False, differentiable=False), x, oracle)


def bias_of(draw: Draw, count: int, dtype: torch.dtype) -> Tensor | None:
    return None if chance(draw, 50) else st.numbers(draw, count, dtype, finite=True).requires_grad_()


def assert_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, outcome: Outcome, geometry: tuple[tuple[int, int], ...] | None
) -> None:
    """A layer of the signs and its gradients, whose sums may be taken in any order."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    given = [t for t in wide if t is not None]

    def layer(*operands: Tensor | None) -> Tensor:
        run = reference.sign_linear if geometry is None else reference.sign_conv2d
        y: Tensor = run(*operands, *(geometry or ()))  # type: ignore[operator]
        return y

    want = layer(*wide)
    added = 0.0 if bias is None else bias.detach().double().abs().amax() if bias.numel() else 0.0
    # Sums of float64 that begin with a tiny bias round it away.
    count = weight[0].numel() if weight.shape[0] else 0
    eps = 2.0**-50 if x.dtype is torch.float64 else oracles.EPS
    # Those that begin with a large one round every step to its precision.
    steps = count * 2.0**-53 if x.dtype is torch.float64 else 0.0
    error = (eps + steps) * (want.detach().abs() + added) + count * 2.0**-50
    oracles.assert_near(outcome.results[0], want.detach(), error, "y")
    if outcome.above is None:
        return
    above = outcome.above.double()
    gradients = torch.autograd.grad(want, given, above)
    # The same sums of magnitudes: all signs +1.
    ones = [None if t is None else torch.ones_like(t).requires_grad_() for t in wide]
    sizes = torch.autograd.grad(layer(*ones), [t for t in ones if t is not None], above.abs())
    oracles.linear_gradients(gradients, sizes, outcome.gradients, x.dtype)


def sign_linear(draw: Draw) -> Trial:
    k, n, dtype = pick(draw, st.LENGTHS), rows(draw), dtype_of(draw)
    x = st.laid_out(draw, (*st.shapes(draw, most_rank=2), k), dtype)
    weight = st.laid_out(draw, (n, k), dtype).requires_grad_()
    bias = bias_of(draw, n, dtype)
    parameters = (weight,) if bias is None else (weight, bias)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.sign_linear(x, weight, bias, backend=backend),)

    sample = Sample("sign_linear", tuple(x.shape), run, like_x=False)
    trial_oracle = lambda outcome: assert_layer(x, weight, bias, outcome, None)  # noqa: E731
    return Trial(sample, x, trial_oracle, parameters, exact=False, exact_gradient=False)


def sign_conv2d(draw: Draw) -> Trial:
    shape, count, kernel = images(draw)
    dtype, geometry = dtype_of(draw), st.geometries(draw, kernel)
    x = st.laid_out(draw, shape, dtype)
    weight = st.laid_out(draw, (count, shape[1], *kernel), dtype).requires_grad_()
    bias = bias_of(draw, count, dtype)
    parameters = (weight,) if bias is None else (weight, bias)

    def run(x: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        return (F.sign_conv2d(x, weight, bias, *geometry, backend=backend),)

    sample = Sample("sign_conv2d", shape, run, like_x=False)
    trial_oracle = lambda outcome: assert_layer(x, weight, bias, outcome, geometry)  # noqa: E731
    return Trial(sample, x, trial_oracle, parameters, exact=False, exact_gradient=False)
