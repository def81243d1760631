"""Layers with packed weights, for inference: one bit a weight in memory and in files."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quantkern import functional
from quantkern.binarized import symmetric_padding, why_not_packed
from quantkern.binary.checks import Pair, pair
from quantkern.nn.packed import PackedLayer, Pool, bias_threshold


class BinaryLinear(PackedLayer):
    """A linear layer of the signs of its input with packed weights, for inference.

    Args:
        in_features, out_features, bias: as of ``nn.Linear``.
        sign: the result is the sign of the sum at a threshold (buffers ``threshold`` int32 [N] and ``flip`` packed).
        packed_output: that sign comes packed, int32 [..., ceil(N / 32)], as the next binary layer reads it.
        device, dtype: where the buffers lie, and the dtype of real results of packed inputs.

    The input is real [..., in_features] or packed int32 [..., ceil(in_features / 32)].

    Buffers: ``weight_packed`` int32 [N, ceil(in_features / 32)], ``bias`` float32 [N]. A state_dict with another
    word size, width or length is an error that says so.

    >>> layer = nn.Linear(40, 3)
    >>> x = torch.randn(2, 40)
    >>> signs = [torch.where(t >= 0, 1.0, -1.0) for t in (x, layer.weight)]
    >>> bool((BinaryLinear.from_float(layer)(x) == nn.functional.linear(*signs) + layer.bias).all())
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sign: bool = False,
        packed_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features,), in_features, bias, sign, packed_output, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_float(cls, layer: nn.Linear, *, sign: bool = False, packed_output: bool = False) -> BinaryLinear:
        """The packed layer with the signs of a linear layer's weight, and with its bias.

        With ``sign`` the thresholds are those of the sum plus bias alone: 1 where it is >= 0.

        Raises:
            TypeError: not a linear layer.

        >>> BinaryLinear.from_float(nn.Linear(64, 8))
        BinaryLinear(in_features=64, out_features=8, bias=True)
        """
        _check_layer(layer, nn.Linear)
        weight, bias = layer.weight, layer.bias
        new = cls(
            layer.in_features, layer.out_features, bias is not None and not sign, sign=sign,
            packed_output=packed_output, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        new.take_weight(weight, -1, bias)
        if sign:
            new.take_threshold(*bias_threshold(bias, new.outputs, new.k, weight))
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] real, or packed."""
        self.check_input(x, x.shape[-1] if x.dim() else 0)
        if self.threshold is None or self.flip is None:
            y = functional.binary_linear(x, self.weight_packed, self.k, self.bias, arranged=self.weights())
            return self.as_real(y, x)
        packed = functional.pack_signs(x) if x.is_floating_point() else x
        assert isinstance(packed, Tensor)
        rows = packed.reshape(math.prod(packed.shape[:-1]), packed.shape[-1])
        y = functional.binary_matmul_sign(
            rows, self.weight_packed, self.k, self.threshold, self.flip, arranged=self.weights()
        )
        y = y.view(*packed.shape[:-1], y.shape[-1])
        return y if self.packed_output else self.real(y, x)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}{self.options()}"


class BinaryConv2d(PackedLayer):
    """A convolution of the signs of its input with packed weights, for inference.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as of ``nn.Conv2d``, with numbers.
        sign, packed_output, device, dtype: as of ``BinaryLinear``; packed images are int32 [N, H, W, words].
        pool: max pooling of the signs, or of the sums before; only with ``sign``.

    The input is real [N, C, H, W], or packed int32 [N, H, W, ceil(C / 32)]. Zero padding adds nothing.

    Buffers: ``weight_packed`` int32 [O, kh, kw, ceil(C / 32)], ``bias`` float32 [O].

    >>> layer = nn.Conv2d(3, 8, 3, padding=1)
    >>> x = torch.randn(1, 3, 5, 5)
    >>> signs = [torch.where(t >= 0, 1.0, -1.0) for t in (x, layer.weight)]
    >>> expected = nn.functional.conv2d(*signs, padding=1) + layer.bias.view(-1, 1, 1)
    >>> bool((BinaryConv2d.from_float(layer)(x) == expected).all())
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        bias: bool = True,
        *,
        sign: bool = False,
        packed_output: bool = False,
        pool: Pool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if pool is not None and not sign:
            raise ValueError("pool needs sign=True: only signs are pooled")
        kernel = pair(kernel_size, "kernel_size", 1)
        super().__init__((out_channels, *kernel), in_channels, bias, sign, packed_output, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size, self.pool = in_channels, out_channels, kernel, pool
        self.stride, self.padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
        self.dilation = pair(dilation, "dilation", 1)

    @classmethod
    def from_float(
        cls, layer: nn.Conv2d, *, sign: bool = False, packed_output: bool = False, pool: Pool | None = None
    ) -> BinaryConv2d:
        """The packed layer with the signs of a convolution's weight, and with its bias; see ``BinaryLinear``.

        Raises:
            TypeError: not a Conv2d. ValueError: groups, padding that is not of zeros, or not the same on both sides.

        >>> BinaryConv2d.from_float(nn.Conv2d(64, 8, 3, padding="same", bias=False))
        BinaryConv2d(64, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
        """
        _check_layer(layer, nn.Conv2d)
        padding = symmetric_padding(layer)
        assert padding is not None
        kernel, stride, dilation = (pair(v, "size", 1) for v in (layer.kernel_size, layer.stride, layer.dilation))
        weight, bias = layer.weight, layer.bias
        new = cls(
            layer.in_channels, layer.out_channels, kernel, stride, padding, dilation, bias is not None and not sign,
            sign=sign, packed_output=packed_output, pool=pool, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        new.take_weight(weight, 1, bias)
        if sign:
            new.take_threshold(*bias_threshold(bias, new.outputs, new.longest_sum, weight))
        return new.train(layer.training)

    @property
    def longest_sum(self) -> int:
        """How many signs a sum has at most."""
        return self.k * math.prod(self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, O, oh, ow] real, or [N, oh, ow, words] packed."""
        if x.is_floating_point() and x.dim() == 3 and not self.packed_output:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4:
            raise ValueError(
                f"x must be images [N, {self.in_channels}, H, W], or packed [N, H, W, {self.weight_packed.shape[-1]}], "
                f"got shape {list(x.shape)}"
            )
        self.check_input(x, x.shape[1])
        geometry = (self.stride, self.padding, self.dilation)
        if self.threshold is None or self.flip is None:
            y = functional.binary_conv2d(
                x, self.weight_packed, self.bias, *geometry, channels=self.k, arranged=self.weights()
            )
            return self.as_real(y, x)
        packed = functional.pack_signs(x, 1) if x.is_floating_point() else x
        assert isinstance(packed, Tensor)
        y = functional.binary_conv2d_sign(
            packed, self.weight_packed, self.k, self.threshold, self.flip, *geometry, arranged=self.weights()
        )
        if self.pool is not None:
            flip = self.flip if self.pool.before_sign else torch.zeros_like(self.flip)
            y = functional.packed_max_pool2d(y, flip, self.pool.kernel_size, self.pool.stride, self.pool.padding)
        return y if self.packed_output else self.real(y, x).permute(0, 3, 1, 2).contiguous()

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1))):
            value = getattr(self, name)
            text += "" if value == default else f", {name}={value}"
        text += self.options()
        if self.pool is not None:
            text += f", max_pool2d={self.pool.kernel_size}, stride={self.pool.stride}"
        return text


def _check_layer(layer: nn.Module, expected: type[nn.Module]) -> None:
    if not isinstance(layer, expected):
        raise TypeError(f"layer must be a torch.nn.{expected.__name__}, got {type(layer).__name__}")
    why = why_not_packed(layer)
    if why is not None:
        raise ValueError(f"layer cannot be packed: {why}; leave it as it is")
