"""Loads the compiled operators and gives torch their shape functions.

After this import ``torch.ops.quantkern.*`` exists. A missing or mismatched extension is an ImportError that says
how to mend it; nothing is replaced silently.
"""

from __future__ import annotations

import torch
from torch import Tensor

REBUILD = "pip install --force-reinstall --no-deps ."


def _load() -> None:
    """Import the extension; a failure says which torch it was built for and how to rebuild it."""
    try:
        from quantkern import _built_for
    except ImportError as error:
        raise ImportError(
            f"quantkern's compiled kernels are missing from this installation ({error}). "
            f"Build them from a checkout of quantkern with: {REBUILD}"
        ) from error
    if _built_for.TORCH_VERSION != torch.__version__:
        raise ImportError(
            f"quantkern's kernels were built for torch {_built_for.TORCH_VERSION}, but torch {torch.__version__} is "
            f"installed. Rebuild them from a checkout of quantkern with: {REBUILD}"
        )
    try:
        import quantkern._C  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"quantkern's compiled kernels do not load ({error}). "
            f"Rebuild them from a checkout of quantkern with: {REBUILD}"
        ) from error


_load()


def _mask(x: Tensor, with_mask: bool) -> Tensor:
    """One bit an element, or nothing."""
    return x.new_empty([(x.numel() + 7) // 8 if with_mask else 0], dtype=torch.uint8)


@torch.library.register_fake("quantkern::fake_quantize")
@torch.library.register_fake("quantkern::fake_quantize.number")
@torch.library.register_fake("quantkern::fake_quantize_weight")
@torch.library.register_fake("quantkern::fake_quantize_activation")
def _like_x(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("quantkern::fake_quantize_forward")
@torch.library.register_fake("quantkern::fake_quantize_forward.number")
@torch.library.register_fake("quantkern::fake_quantize_activation_forward")
def _like_x_and_mask(x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    with_mask = bool(kwargs["with_mask"] if "with_mask" in kwargs else args[-1])
    return torch.empty_like(x), _mask(x, with_mask)


@torch.library.register_fake("quantkern::fake_quantize_weight_forward")
def _weight_forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    axis: int | None,
    step: Tensor | None,
    start_step: int,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _mask(x, with_mask)


@torch.library.register_fake("quantkern::fake_quantize_backward")
def _backward(grad: Tensor, mask: Tensor, strides: list[int]) -> Tensor:
    return grad.new_empty_strided(grad.shape, strides)
