"""Training that is interrupted, saved, loaded and gone on with, the same for every quantizer."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Start = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
Train = Callable[[nn.Module, torch.optim.Optimizer, range], Any]


def flat(losses: Any) -> list[Tensor]:
    """What a training returned, as tensors."""
    return [torch.as_tensor(loss) for loss in losses]


def check_exact_resume(start: Start, train: Train, before: int, after: int) -> tuple[nn.Module, nn.Module]:
    """Losses after a resume equal those of a training that went on, and so does every tensor of the state.

    Returns the resumed model and the one that went on, for what is not in a state_dict.
    """
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
