"""DoReFa-Net's weights, activations and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkern.reference.affine import SMALLEST_SCALE, straight_through


class DorefaWeight(torch.autograd.Function):
    """Zhou et al. 2016, eq. 9: straight through the rounding only; tanh and the maximum have their true gradients."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, bits: int) -> Tensor:  # noqa: D102
        ctx.save_for_backward(w)
        ctx.bits = bits
        wide = w if w.dtype is torch.float64 else w.float()
        if bits == 1:
            mean = wide.abs().double().mean().to(wide.dtype)
            return torch.where(wide >= 0, mean, torch.where(wide < 0, -mean, wide)).to(w.dtype)
        t, steps = torch.tanh(wide), float(2**bits - 1)
        if not t.numel():
            return w.clone()
        largest = t.abs().nan_to_num(0.0).amax().clamp(min=SMALLEST_SCALE)
        return (2 * (torch.round((t / (2 * largest) + 0.5) * steps) / steps) - 1).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (w,) = ctx.saved_tensors
        if ctx.bits == 1 or not w.numel():
            return grads[0], None
        grad, wide = (v if v.dtype is torch.float64 else v.float() for v in (grads[0], w))
        t = torch.tanh(wide)
        magnitude = t.abs().nan_to_num(0.0)
        largest = magnitude.amax()
        if largest == 0:
            return torch.zeros_like(grads[0]), None
        at_largest = magnitude == largest
        # Not largest * largest, which underflows where every weight is tiny.
        through_largest = (grad * t).double().sum().to(t.dtype) / largest / largest / at_largest.sum()
        dt = grad / largest - torch.where(at_largest, torch.sign(t) * through_largest, torch.zeros_like(t))
        return (dt * (1 - t * t)).to(grads[0].dtype), None


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """DoReFa-Net's weights, in [-1, 1] (Zhou et al. 2016, section 2.3).

    bits > 1: 2 * q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1 with q(z) = rint(z * n) / n, n = 2^bits - 1; the gradient
    passes the rounding and goes truly through tanh and the maximum (shared equally where several weights attain it;
    none for an all-zero tensor). bits = 1: sign(w) * mean|w| with sign(0) = +1, and the gradient passes.
    """
    y: Tensor = DorefaWeight.apply(w, bits)  # type: ignore[no-untyped-call]
    return y


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """q(clip(x, 0, 1)) with q as in ``dorefa_weight``; the gradient passes where 0 <= x <= 1 (section 2.4)."""
    wide, steps = (x.detach() if x.dtype is torch.float64 else x.detach().float()), float(2**bits - 1)
    y = torch.round((wide.clamp(0, 1) + 0.0) * steps) / steps  # + 0.0: the grid has one zero, +0
    return straight_through(x, y.to(x.dtype), (wide >= 0) & (wide <= 1))


def philox(seed: int, count: int) -> Tensor:
    """``count`` 32-bit words of Philox4x32-10 (Salmon et al. 2011) as int64: word i of block i // 4 under ``seed``."""
    low32 = 0xFFFFFFFF
    block = torch.arange((count + 3) // 4, dtype=torch.int64)
    words = [block & low32, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    keys = [seed & low32, (seed >> 32) & low32]
    for _ in range(10):
        halves = []
        for word, factor in ((words[0], 0xD2511F53), (words[2], 0xCD9E8D57)):
            # A 64-bit product in two parts, since int64 has no room for its sign bit.
            part = (word & 0xFFFF) * factor
            upper = (word >> 16) * factor + (part >> 16)
            halves += [upper >> 16, ((upper & 0xFFFF) << 16) | (part & 0xFFFF)]
        words = [halves[2] ^ words[1] ^ keys[0], halves[3], halves[0] ^ words[3] ^ keys[1], halves[1]]
        keys = [(keys[0] + 0x9E3779B9) & low32, (keys[1] + 0xBB67AE85) & low32]
    return torch.stack(words, 1).reshape(-1)[:count]


def gradient_noise(grad: Tensor, seed: int) -> Tensor:
    """Uniform in [-1/2, 1/2), float32: word i of ``philox(seed)`` for element i of grad in memory order."""
    noise = torch.empty_like(grad, dtype=torch.float32)
    uniform = (philox(seed, grad.numel()) >> 8).to(torch.float32) * 2.0**-24 - 0.5
    noise.as_strided((noise.numel(),), (1,)).copy_(uniform)
    return noise


def dorefa_gradient(grad: Tensor, bits: int, seed: int) -> Tensor:
    """2 M (q(g / (2 M) + 1/2 + noise) - 1/2), M the largest |g| of each sample (first axis), 0 where M is 0.

    noise is ``gradient_noise`` / n; q is clamped to [0, 1]. A sample whose M is not finite comes back unchanged, so
    that loss scaling sees it (section 2.5, eq. 12).
    """
    steps = float(2**bits - 1)
    wide = grad if grad.dtype is torch.float64 else grad.float()
    rows = wide.flatten(1) if wide.dim() > 1 else wide.reshape(1, -1)
    largest = torch.where(rows.isnan(), 0, rows.abs()).amax(1) if rows.numel() else rows.new_zeros(rows.shape[0])
    shape = [-1] + [1] * (grad.dim() - 1) if grad.dim() > 1 else [1] * grad.dim()
    width = (2 * largest).reshape(shape)
    q = torch.round((wide / width + 0.5) * steps + gradient_noise(grad, seed).to(wide.dtype)).clamp(0, steps)
    y = torch.where(width > 0, (q / steps - 0.5) * width, torch.zeros_like(wide))
    return torch.where(torch.isfinite(width), y, wide).to(grad.dtype)
