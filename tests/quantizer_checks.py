"""What the tests of every quantizer check in the same way: exact resumption, and that nothing waits for a device."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Attach = Callable[[nn.Module, torch.optim.Optimizer], object]
Train = Callable[[nn.Module, torch.optim.Optimizer, range], Any]


class NoReads(TorchDispatchMode):
    """Fails where a value is read back to the host; ``more``: further operations that wait for their device."""

    def __init__(self, *more: Any) -> None:
        super().__init__()
        self.waiting = (torch.ops.aten._local_scalar_dense, *more)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        assert func.overloadpacket not in self.waiting, f"{func}: a value was read back to the host"
        return func(*args, **(kwargs or {}))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


def flat(losses: Any) -> list[Tensor]:
    """What a training returned, as tensors."""
    return [torch.as_tensor(loss) for loss in losses]


def check_exact_resume(
    net: Callable[[], nn.Module], attach: Attach, train: Train, before: int, after: int
) -> tuple[nn.Module, nn.Module]:
    """Losses after a resume equal those of a training that went on, and so does every tensor of the state.

    Returns the resumed model and the one that went on, for what is not in a state_dict.
    """

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        attach(model, optimizer)
        return model, optimizer

    whole, whole_optimizer = start()
    train(whole, whole_optimizer, range(before))
    file = io.BytesIO()
    torch.save([whole.state_dict(), whole_optimizer.state_dict()], file)
    expected = flat(train(whole, whole_optimizer, range(before, before + after)))
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    resumed, optimizer = start()
    resumed.load_state_dict(state, strict=True)
    optimizer.load_state_dict(optimizer_state)
    got = flat(train(resumed, optimizer, range(before, before + after)))
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))
    own, other = resumed.state_dict(), whole.state_dict()
    assert own.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
    return resumed, whole
