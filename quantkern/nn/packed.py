"""What layers with packed weights share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantkern import functional
from quantkern.binary.checks import check_padding_bits
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
