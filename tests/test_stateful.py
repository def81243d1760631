"""Quantizers under anything a program may do with them, in any order: ``quantizer_session`` driven by hypothesis."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from quantizer_session import Session
from random_models import QUANTIZERS
from strategies import HypothesisDraw, RandomDraw, pick
from torch import nn

from quantkern import LsqQuantizer, QAT_Quantizer
from quantkern.running_range import ActivationFakeQuant


class Machine(RuleBasedStateMachine):
    """Every action is a rule; the invariants are those of the session."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    @initialize(data=st.data())
    def start(self, data: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.session = Session(HypothesisDraw(data), Path(self.folder.name))

    @rule(data=st.data(), action=st.sampled_from(Session.actions))
    def act(self, data: Any, action: str) -> None:
        self.session.act(HypothesisDraw(data), action)

    def teardown(self) -> None:
        self.folder.cleanup()


def test_any_order_of_actions() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def play(seed: int, folder: Path, kind: str | None = None, actions: int = 8) -> Session:
    """A session that follows from a seed."""
    draw = RandomDraw(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        session = Session(draw, folder, kind)
    for _ in range(actions):
        session.act(draw, pick(draw, session.actions))
    return session


def test_random_sessions_of_every_quantizer(tmp_path: Path) -> None:
    """Parameters move, scales are learned, observers are compressed, batch norms are folded, and models come back."""
    seen: Counter[str] = Counter()
    for seed, kind in enumerate([*QUANTIZERS] * 12):
        session = play(seed, tmp_path, kind)
        seen["moved"] += any(parameter.grad is not None for parameter in session.parameters.values())
        seen["learned"] += isinstance(session.quantizer, LsqQuantizer) and "step" in session.history
        seen["compressed"] += session.kind == "observer" and session.compressed
        seen["folded"] += bool(getattr(session.quantizer, "folded_layers", None))
        seen["exported"] += "export" in session.history and session.compressed
        seen["shared"] += session.recipe.shared
        seen["rules"] += len(session.config) > 1
        seen[session.recipe.kind] += 1
    assert min(seen.values()) >= 3, seen


def break_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkern.current_range.WeightFakeQuant.forward", lambda self, x: x.detach())
    monkeypatch.setattr("quantkern.all_weights.AllWeights.before", lambda self, model, args: None)


def break_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ActivationFakeQuant._load_from_state_dict

    def lossy(self: Any, state_dict: Any, prefix: str, *more: Any) -> None:
        loaded(self, state_dict, prefix, *more)
        self.scale.mul_(2)

    monkeypatch.setattr(ActivationFakeQuant, "_load_from_state_dict", lossy)


def after_detach(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object]) -> None:
    detach = QAT_Quantizer._detach

    def detach_and_change(self: Any) -> None:
        detach(self)
        change(self.bound_model)

    monkeypatch.setattr(QAT_Quantizer, "_detach", detach_and_change)


def leave_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    after_detach(monkeypatch, lambda model: model.register_forward_hook(lambda *_: None))


def change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    after_detach(monkeypatch, lambda model: next(model.parameters()).data.view(torch.int32).bitwise_xor_(1))


def replace_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: nn.Module) -> None:
        owner = next(module for module in model.modules() if "weight" in module._parameters)
        owner.weight = nn.Parameter(owner.weight.detach().clone())  # type: ignore[operator]

    after_detach(monkeypatch, change)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (break_gradients, "got no gradient"),
        (break_loading, "a loaded state_dict"),
        (leave_a_hook, "has a hook"),
        (change_a_bit, "the exported state_dict"),
        (replace_a_parameter, "is no parameter of the model any more"),
    ],
)
def test_a_session_notices(
    defect: Callable[[pytest.MonkeyPatch], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight without a gradient, a number that is loaded wrongly, a hook that stays, a bit, a lost parameter."""
    defect(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        for seed in range(60):
            play(seed, tmp_path, "qat", 12)
