"""Layers with packed weights, for inference: one bit a weight in memory and in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantkern import functional
from quantkern.binarized import symmetric_padding, why_not_packed
from quantkern.binary import Pair, check_padding_bits, pair
from quantkern.reference import words_of

REPACK = "convert() the trained quantizer again, or pack the weight's signs with quantkern.functional.pack_signs"


class Pool(NamedTuple):
    """Max pooling inside a layer, of sums before their sign is taken or of signs."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    before_sign: bool


class PackedLayer(nn.Module):
    """What both layers share: the buffers, what may be loaded into them, and what becomes of a sum.

    Without ``sign`` the result is real: the sum plus the bias. With it the result is the sign of what followed the
    layer, folded into one integer threshold a channel: packed, or +1 and -1 in real numbers.
    """

    weight_packed: Tensor
    bias: Tensor | None
    threshold: Tensor | None
    flip: Tensor | None
    like: Tensor
    arranged: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        k: int,
        bias: bool,
        sign: bool,
        packed_output: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if packed_output and not sign:
            raise ValueError("packed_output needs sign=True: only signs can be packed")
        if bias and sign:
            raise ValueError("a layer with sign=True has no bias, its thresholds hold it; pass bias=False")
        outputs, self.k, self.packed_output = shape[0], k, packed_output
        self.rows_only = False  # thresholds hold a batch norm over the last of two dimensions
        self.register_buffer("weight_packed", torch.zeros((*shape, words_of(k)), dtype=torch.int32, device=device))
        self.register_buffer("bias", torch.zeros(outputs, device=device) if bias else None)
        self.register_buffer("threshold", torch.zeros(outputs, dtype=torch.int32, device=device) if sign else None)
        flip = torch.zeros(words_of(outputs), dtype=torch.int32, device=device) if sign else None
        self.register_buffer("flip", flip)
        # Follows the model to another dtype, as real outputs of packed inputs shall.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_buffer("arranged", None, persistent=False)

    @property
    def sign(self) -> bool:
        """Whether the result is a sign."""
        return self.threshold is not None

    @torch.no_grad()
    def take_weight(self, weight: Tensor, axis: int, bias: Tensor | None) -> None:
        """Pack the signs of a real weight."""
        packed = functional.pack_signs(weight.detach(), axis)
        assert isinstance(packed, Tensor)
        self.weight_packed.copy_(packed)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        self.arranged = None

    @torch.no_grad()
    def take_threshold(self, threshold: Tensor, flip: Tensor) -> None:
        """Fold what follows: bit n becomes (sum >= threshold[n]) xor flip[n]; int [N] and bool [N]."""
        assert self.threshold is not None and self.flip is not None
        packed = functional.pack_signs(torch.where(flip, 1.0, -1.0))
        assert isinstance(packed, Tensor)
        self.threshold.copy_(threshold)
        self.flip.copy_(packed)

    def weights(self) -> Tensor | None:
        """The packed weights in the order this device's kernels read, made when first needed; never saved."""
        if self.arranged is None and not torch.compiler.is_compiling():
            self.arranged = functional.arrange_signs(self.weight_packed)
        return self.arranged

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """Follow the model to another device; float32 and int32 stay what they are."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is self.like or moved.dtype is tensor.dtype else tensor.to(moved.device)

        self.arranged = None
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {**self._buffers, "arranged": None}}

    def saved(self) -> dict[str, Tensor]:
        """The buffers that a state_dict holds."""
        names = ("weight_packed", "bias", "threshold", "flip")
        return {name: value for name in names if (value := self._buffers[name]) is not None}

    def check_state(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What in a state_dict cannot be loaded here, and how to mend it."""
        problems = []
        for name, own in self.saved().items():
            given = state_dict.get(prefix + name)
            if given is None:
                continue
            if not isinstance(given, Tensor):
                problems.append(f"{prefix}{name} is {type(given).__name__}, expected a tensor")
                continue
            found, expected = (f"{t.dtype} of shape {list(t.shape)}" for t in (given, own))
            if given.dtype is not own.dtype or given.shape != own.shape:
                packed = name in ("weight_packed", "flip")
                what = f" ({self.k} signs, 32 a word)" if name == "weight_packed" else ""
                mend = f"; {REPACK}" if packed else "; load the state_dict of a layer with the same arguments"
                problems.append(f"{prefix}{name} is {found}, expected {expected}{what}{mend}")
            elif name in ("weight_packed", "flip"):
                try:
                    check_padding_bits(given, self.k if name == "weight_packed" else self.outputs, prefix + name)
                except ValueError as error:
                    problems.append(str(error))
        return problems

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        problems = self.check_state(state_dict, prefix)
        keys = [prefix + name for name in self.saved()]
        absent = [key for key in keys if key not in state_dict]
        if problems or (strict and absent):  # nothing of this layer is loaded
            error_msgs += problems
            missing_keys += absent
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in keys]
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # type: ignore[no-untyped-call]
        self.arranged = None

    @property
    def outputs(self) -> int:
        """How many channels or features come out."""
        return self.weight_packed.shape[0]

    def real(self, packed: Tensor, x: Tensor) -> Tensor:
        """Packed signs as +1 and -1, in x's dtype where x is real."""
        return functional.unpack_signs(packed, self.outputs, x.dtype if x.is_floating_point() else self.like.dtype)

    def as_real(self, y: Tensor, x: Tensor) -> Tensor:
        """A real result in the dtype that the float layer would give."""
        return y if x.is_floating_point() else y.to(self.like.dtype)

    def check_input(self, x: Tensor, size: int) -> None:
        """An input that is packed already says by its width that it holds enough signs."""
        if not x.is_floating_point() and x.dtype is not torch.int32:
            raise TypeError(f"x must be floating point, or packed signs in int32, got {x.dtype}")
        if x.is_floating_point() and size != self.k:
            raise ValueError(f"x must have {self.k} channels or features, got {size} in shape {list(x.shape)}")
        if self.rows_only and x.dim() != 2:
            raise ValueError(
                f"x must have 2 dimensions, as the batch norm in this layer's thresholds had, got shape {list(x.shape)}"
            )

    def options(self) -> str:
        """The end of ``extra_repr``."""
        if self.sign:
            return ", sign, packed output" if self.packed_output else ", sign"
        return f", bias={self.bias is not None}"


def check_all_states(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Pre-hook of ``load_state_dict``: refuse what does not fit before anything is loaded."""
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            problems += module.check_state(state_dict, f"{prefix}{name}." if name else prefix)
    if problems:
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ValueError(f"state_dict does not fit the packed layers, nothing was loaded:{lines}")


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


def bias_threshold(bias: Tensor | None, outputs: int, longest: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds of the sign of a sum plus bias, and no flips."""
    return find_thresholds(lambda y: y, bias, outputs, longest, like)


@torch.no_grad()
def find_thresholds(
    follow: Callable[[Tensor], Tensor], bias: Tensor | None, outputs: int, longest: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The integer thresholds that decide as ``sign(follow(sum + bias))`` does, channel by channel.

    ``follow`` takes and returns [rows, outputs] and is monotone in every channel, rising or falling. Each threshold
    is found by bisection with ``follow`` itself, so it has its very roundings; a channel that always decides alike
    gets one below all sums.

    Returns:
        threshold int32 [outputs], flip bool [outputs].
    """
    device = like.device

    def decide(sums: Tensor) -> Tensor:
        y = sums.to(torch.float32)
        y = y if bias is None else y + bias.detach().float()
        return follow(y.to(like.dtype).unsqueeze(0)).squeeze(0) >= 0

    low = torch.full((outputs,), -longest, dtype=torch.int64, device=device)
    high = torch.full_like(low, longest)
    first, last = decide(low), decide(high)
    for _ in range(max(1, (2 * longest).bit_length())):  # low decides as the smallest sum, high as the largest
        middle = (low + high).div(2, rounding_mode="floor")
        as_first = decide(middle) == first
        low, high = torch.where(as_first, middle, low), torch.where(as_first, high, middle)
    constant = first == last
    threshold = torch.where(constant, torch.full_like(high, -longest), high)
    flip = torch.where(constant, ~first, first)
    return threshold.to(torch.int32), flip
