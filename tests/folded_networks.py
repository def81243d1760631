"""Networks with batch norms, and what the tests of folding do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantkern import reference
from quantkern.learned import LearnedWeight
from quantkern.quantizers import LsqQuantizer, QAT_Quantizer

BOTH = pytest.mark.parametrize("kind", [QAT_Quantizer, LsqQuantizer])
LAYERS = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64, 8)
        self.bn1 = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(self.bn1(self.fc(self.relu(self.bn(self.conv(x))).flatten(1)))))


def shake(model: nn.Module) -> nn.Module:
    """Batch norms as after some training: all of their numbers differ, some gammas are negative."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator))
            module.running_var.copy_(torch.rand(size, generator=generator) * 3 + 0.1)
            if module.affine:
                with torch.no_grad():
                    sign = torch.tensor([1.0, -1.0]).repeat(size)[:size]
                    module.weight.copy_((torch.rand(size, generator=generator) + 0.3) * sign)
                    module.bias.copy_(torch.randn(size, generator=generator))
    return model


def net() -> Net:
    torch.manual_seed(0)
    return shake(Net())  # type: ignore[return-value]


def batch(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(size, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def rules(bits: int = 8, types: str = "weight", layers: tuple[str, ...] = ("Conv2d", "Linear"), **more: Any) -> Any:
    return [{"quant_types": types.split(), "quant_bits": bits, "op_types": list(layers), **more}]


def fine(kind: type) -> dict[str, Any]:
    """Scales that lose little from the start: LSQ's own are meant for 2 to 4 bits."""
    return {"init": "minmax"} if kind is LsqQuantizer else {}


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, seeds: range, call: Any = None) -> list[Tensor]:
    model.train()
    outputs = []
    for seed in seeds:
        model.zero_grad()
        output = (model if call is None else call)(batch(seed))
        output.square().mean().backward()
        if optimizer is not None:
            optimizer.step()
        outputs.append(output.detach())
    return outputs


def on_grid(weight: Tensor, quantizer: nn.Module, factor: Tensor) -> Tensor:
    """What the fake-quantizer on a weight makes of this folded one, by the reference."""
    low, high = quantizer.spec.quant_range
    zero_point = 0 if quantizer.zero_point is None else quantizer.zero_point
    scale = quantizer.scale.detach()
    if isinstance(quantizer, LearnedWeight):
        scale = scale * factor.abs().mean()
    return reference.quantize(weight, scale, torch.as_tensor(zero_point), low, high, None)[0]


class Convolutions(TorchDispatchMode):
    """Counts convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        self.count += any(word in str(func) for word in ("convolution.default", "mm.default", "matmul"))
        return func(*args, **(kwargs or {}))


def layer_of(name: str, groups: int = 1, **more: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer, a batch norm for it and a batch."""
    torch.manual_seed(1)
    if name == "Linear":
        return nn.Linear(4, 6, **more), nn.BatchNorm1d(6), torch.randn(16, 4)
    dims = int(name[-2])
    layer = getattr(nn, name)(4, 6, 3, padding=1, groups=groups, **more)
    return layer, getattr(nn, f"BatchNorm{dims}d")(6), torch.randn(16, 4, *(5,) * dims)


class Untraceable(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e6:
            raise ValueError("too large")
        y = self.conv(x)
        assert y.shape[1] == 4 and y.dtype is x.dtype
        return self.out(self.relu(self.bn1(self.fc(self.relu(self.bn(y)).flatten(1)))))
