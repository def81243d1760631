"""A random model under a random quantizer, what may be done with it in any order, and what must hold all the time."""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from random_models import QUANTIZERS, batch, build, configs, foldings, recipes
from strategies import Draw, chance, pick
from torch import Tensor, nn
from torch.nn.utils import parametrize
from trials import same_bits

from quantkern import LsqQuantizer, ObserverQuantizer
from quantkern.config import CHILD_NAME
from quantkern.quantizers.base import Quantizer
from quantkern.quantizers.bnn import BNNQuantizer

ATTEMPTS = 6
"""Configurations to draw until one is valid; each of the others must leave the model as it is."""

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(got: State, expected: State, what: str) -> None:
    """The same names in the same order, the same bits."""
    assert list(got) == list(expected), f"{what}: names differ: {sorted(got.keys() ^ expected.keys())}"
    unequal = [name for name, value in expected.items() if not same_bits(got[name], value)]
    assert not unequal, f"{what}: {', '.join(unequal)} differ"


class Session:
    """actions: the names of the methods that may be called in any order, each with a ``Draw``.

    Some are named twice, and called twice as often.
    """

    actions = (
        "step", "step", "evaluate", "micro_batches", "write_weights", "change_mode", "forward_only", "copy_model",
        "copy_quantizer", "resume", "resume", "report", "freeze", "compress", "compress", "export", "refuse",
    )  # fmt: skip

    def __init__(self, draw: Draw, folder: Path, kind: str | None = None) -> None:
        self.folder = folder
        self.recipe, self.kind = recipes(draw), kind or pick(draw, tuple(QUANTIZERS))
        self.knows_optimizer, self.adam = not chance(draw, 30), chance(draw, 40)
        self.dummy, self.history = chance(draw, 30), [f"{self.recipe}"]
        self.folding = foldings(draw, self.recipe, self.kind)
        self.compressed = self.kind != "observer"
        model = build(self.recipe)
        self.classes = {name: type(module) for name, module in model.named_modules()}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.float_names = list(model.state_dict())
        self.config: list[dict[str, Any]] = []
        self._attach_first(draw, model)

    def describe(self) -> str:
        return " > ".join([f"{self.kind} {self.config} {self.folding}", *self.history])

    def _attach_first(self, draw: Draw, model: nn.Module) -> None:
        before = state_of(model)
        for _ in range(ATTEMPTS):
            self.config = configs(draw, self.kind, model)
            try:
                self._take(model, *self.attach(model))
                break
            except ValueError:
                assert_same_state(state_of(model), before, "a refused config_list")
                self._assert_float(model)
        else:
            bits = 1 if self.kind == "bnn" else 8
            self.config = [{"op_types": ["default"], "quant_types": ["weight"], "quant_bits": bits}]
            self._take(model, *self.attach(model))
        values = {**model.state_dict(), **self.parameters}
        assert_same_state({name: values[name] for name in before}, before, "the float model under a new quantizer")
        self.check_parameters()

    def attach(self, model: nn.Module) -> tuple[Quantizer, torch.optim.Optimizer]:
        """The quantizer of this session on a model, and a new optimizer."""
        model.train(self.kind != "observer")
        more = {**self.folding, "dummy_input": batch(self.recipe, 0) if self.dummy else None}
        optimizer = self._optimizer(model) if self.knows_optimizer else None
        quantizer = QUANTIZERS[self.kind](model, self.config, optimizer, **more)
        return quantizer, optimizer or self._optimizer(model)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.Adam(model.parameters(), lr=0.01)
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def _take(self, model: nn.Module, quantizer: Quantizer, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.quantizer, self.optimizer = model, quantizer, optimizer

    def act(self, draw: Draw, action: str) -> None:
        """One action, and the invariants after it."""
        self.history.append(action)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            getattr(self, action)(draw)
            self.check_parameters()

    def check_parameters(self) -> None:
        """No parameter has become another one, and the optimizer holds each once."""
        own = {id(parameter) for parameter in self.model.parameters()}
        held = [id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, parameter in self.parameters.items():
            assert id(parameter) in own, f"{name} is no parameter of the model any more"
            assert held.count(id(parameter)) == 1, f"the optimizer holds {name} {held.count(id(parameter))} times"

    # ------------------------------------------------------------ actions

    def train_once(self, model: nn.Module, quantizer: Quantizer, optimizer: Any, seed: int) -> Tensor:
        """One step; the loss."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.backward(model, seed)
        self._check_gradients(quantizer, loss)
        optimizer.step()
        if isinstance(quantizer, BNNQuantizer) and not self.knows_optimizer:
            quantizer.step()
        return loss

    def backward(self, model: nn.Module, seed: int) -> Tensor:
        """Forward and backward; the noise of DoReFa's gradients follows from the seed."""
        torch.manual_seed(seed)
        y = model(*batch(self.recipe, seed))
        loss = (y - torch.linspace(-1, 1, y.shape[-1])).square().mean()
        assert loss.requires_grad, "the whole model got no gradient"
        loss.backward()
        return loss.detach()

    def _check_gradients(self, quantizer: Quantizer, loss: Tensor) -> None:
        for attachment in quantizer._attachments:
            if attachment.weight is None:
                continue
            weight = attachment.layer.parametrizations["weight"].original  # type: ignore[index]
            assert weight.grad is not None, f"the weight of {attachment.name} got no gradient"
            assert weight.grad.isfinite().all() or not loss.isfinite(), f"the gradient of {attachment.name}"

    def step(self, draw: Draw) -> None:
        seed = draw.integer(0, 99)
        if not self.compressed:
            self.model.eval()
            with torch.no_grad():
                self.model(*batch(self.recipe, seed))
            return
        self.train_once(self.model, self.quantizer, self.optimizer, seed)
        if isinstance(self.quantizer, LsqQuantizer) and self.knows_optimizer:
            held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
            assert all(id(scale) in held for scale in self.quantizer.scale_parameters()), "a scale is not trained"

    def output(self, model: nn.Module, seed: int = 5) -> Tensor:
        """In evaluation mode; the mode comes back."""
        training = model.training
        with torch.no_grad():
            y: Tensor = model.eval()(*batch(self.recipe, seed))
        model.train(training)
        return y

    def evaluate(self, draw: Draw) -> None:
        """Evaluation changes nothing, but what an observer sees before it is compressed."""
        self.output(self.model)  # quantizers of further tensors are made in the first forward
        before = state_of(self.model)
        first = self.output(self.model, 7)
        assert same_bits(self.output(self.model, 7), first), "two evaluations differ"
        if self.compressed:
            assert_same_state(state_of(self.model), before, "evaluation")

    def _reusing(self, quantizer: Quantizer) -> AbstractContextManager[None]:
        """The block in which weights are quantized once, where the quantizer has one."""
        return quantizer.reuse_weights() if self.kind in ("qat", "lsq", "naive") else nullcontext()  # type: ignore[attr-defined, no-any-return]

    def micro_batches(self, draw: Draw) -> None:
        """Weights that are quantized once give what weights give that are quantized for every forward."""
        if not self.compressed:
            return
        twin, seed = copy.deepcopy(self.model), draw.integer(0, 99)
        for model in (twin, self.model):
            model.zero_grad(set_to_none=True)
        with self._reusing(self.quantizer):
            for k in range(2):
                assert same_bits(self.backward(self.model, seed + k), self.backward(twin, seed + k)), "reused weights"
            self._check_gradients(self.quantizer, torch.zeros(()))
            gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (self.model, twin)]
            assert_same_state(*gradients, "gradients with reused weights")
            if chance(draw, 50):
                self.optimizer.step()
                assert same_bits(self.output(self.model), self.output(copy.deepcopy(self.model))), "stale weights"
        assert same_bits(self.output(self.model), self.output(copy.deepcopy(self.model))), "stale weights"

    def write_weights(self, draw: Draw) -> None:
        """Weights that are written by hand count at once, in every way that torch has."""
        name = pick(draw, sorted(self.parameters))
        parameter, way = self.parameters[name], draw.integer(0, 2)
        with self._reusing(self.quantizer), torch.no_grad():
            self.output(self.model)
            if way == 0:
                parameter.mul_(0.75)
            elif way == 1:
                parameter.copy_(torch.full_like(parameter, 0.125))
            else:
                state = self.model.state_dict()
                self.model.load_state_dict({key: value * 1 for key, value in state.items()}, strict=True)
                parameter += 0.01
            if self.compressed:
                assert same_bits(self.output(self.model), self.output(copy.deepcopy(self.model))), f"stale {name}"

    def change_mode(self, draw: Draw) -> None:
        if self.compressed:
            self.model.train(chance(draw, 50))

    def forward_only(self, draw: Draw) -> None:
        """A training forward whose result nobody uses."""
        if self.compressed:
            self.model(*batch(self.recipe, draw.integer(0, 99)))

    def copy_model(self, draw: Draw) -> None:
        """A copy computes the same, and lives on its own."""
        if not self.compressed:
            return
        seed, twin = draw.integer(0, 99), copy.deepcopy(self.model)
        assert same_bits(self.output(twin), self.output(self.model)), "a copy computes something else"
        before = state_of(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        twin.zero_grad(set_to_none=True)
        loss = self.backward(twin, seed)
        assert_same_state(state_of(self.model), before, "training a copy changes the model")
        assert all(parameter.grad is None for parameter in self.model.parameters())
        assert same_bits(self.backward(self.model, seed), loss), "a copy trains otherwise"
        assert_same_state(state_of(twin), state_of(self.model), "a copy after a training forward")
        gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (twin, self.model)]
        assert_same_state(*gradients, "gradients of a copy")

    def copy_quantizer(self, draw: Draw) -> None:
        """A copied quantizer exports its own model; the other one stays quantized."""
        if not self.compressed:
            return
        whole = copy.deepcopy(self.quantizer)
        expected = self.output(self.model)
        before = state_of(self.model)
        whole.export_model(self.folder / "copy.pt")
        self._assert_float(whole.bound_model)
        assert same_bits(self.output(self.model), expected), "exporting a copy changes the model"
        assert_same_state(state_of(self.model), before, "exporting a copy")

    def resume(self, draw: Draw) -> None:
        """A new process with the same program and the two state_dicts goes on with the same numbers."""
        file = self.folder / "resume.pt"
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        state, optimizer_state = torch.load(file, weights_only=True)
        fresh = build(self.recipe)
        parameters = dict(fresh.named_parameters(remove_duplicate=False))
        quantizer, optimizer = self.attach(fresh)
        fresh.load_state_dict(state, strict=True)
        optimizer.load_state_dict(optimizer_state)
        fresh.train(self.model.training)
        assert_same_state(state_of(fresh), state_of(self.model), "a loaded state_dict")
        assert same_bits(self.output(fresh), self.output(self.model)), "a resumed model computes something else"
        if self.compressed:
            seed = draw.integer(0, 99)
            losses = [
                self.train_once(model, own, stepping, seed)
                for model, own, stepping in (
                    (self.model, self.quantizer, self.optimizer),
                    (fresh, quantizer, optimizer),
                )
            ]
            assert same_bits(*losses), "the loss after a resume"
            assert_same_state(state_of(fresh), state_of(self.model), "the first step after a resume")
        self.parameters = parameters
        self._take(fresh, quantizer, optimizer)

    def report(self, draw: Draw) -> None:
        """A report changes nothing."""
        self.output(self.model)
        before, mode = state_of(self.model), self.model.training
        made = self.quantizer.report(batch(self.recipe, 3) if chance(draw, 50) else None)
        assert made.rows and str(made)
        assert_same_state(state_of(self.model), before, "a report")
        assert self.model.training == mode

    def freeze(self, draw: Draw) -> None:
        """Ranges stand still; what LSQ and observers keep of it is not part of a state_dict."""
        if self.compressed and not isinstance(self.quantizer, (LsqQuantizer, ObserverQuantizer)):
            self.quantizer.freeze_ranges(chance(draw, 50))

    def compress(self, draw: Draw) -> None:
        """The user's own model; an observer may say that it has seen nothing."""
        before = state_of(self.model)
        try:
            assert self.quantizer.compress() is self.model
            self.compressed = True
        except RuntimeError as error:
            assert not self.compressed and "no calibration batch" in str(error)
            assert_same_state(state_of(self.model), before, "a refused compress()")

    def refuse(self, draw: Draw) -> None:
        """A second quantizer, or a state_dict of another model, is refused and changes nothing."""
        before, expected = state_of(self.model), self.output(self.model)
        before = state_of(self.model) if not self.compressed else before
        try:
            self.attach(self.model)
        except ValueError as error:
            assert "has a quantizer already" in str(error) or self.kind == "observer", error
        else:
            raise AssertionError("a second quantizer was taken")
        self.model.train(self.quantizer.training)
        if self.compressed:
            assert same_bits(self.output(self.model), expected), "a refused quantizer changes the model"
        assert list(state_of(self.model)) == list(before)

    def export(self, draw: Draw) -> None:
        """The float model comes back bit for bit; quantized again with the exported numbers, it computes the same."""
        self.output(self.model)
        quantized = self.output(self.model)
        if not self.compressed:
            try:
                self.quantizer.export_model(self.folder / "never.pt")
            except RuntimeError:
                assert not (self.folder / "never.pt").exists()
                return
            raise AssertionError("an observer was exported before compress()")
        values = {**self.model.state_dict(), **self.parameters}
        expected = {name: values[name].detach().clone() for name in self.float_names}
        calibration = self.quantizer.export_model(self.folder / "model.pt", self.folder / "calibration.pt")
        saved = torch.load(self.folder / "model.pt", weights_only=True)
        assert_same_state(saved, expected, "the exported state_dict")
        assert_same_state(state_of(self.model), expected, "the model after an export")
        fresh = build(self.recipe)
        fresh.load_state_dict(saved, strict=True)
        assert same_bits(self.output(fresh), self.output(self.model)), "the exported model is not the float model"
        self._assert_float(self.model)
        self.check_parameters()
        again, optimizer = self.attach(self.model)
        again.load_calibration_config(torch.load(self.folder / "calibration.pt", weights_only=True))
        assert list(calibration) == [attachment.name for attachment in again._attachments]
        self._take(self.model, again, optimizer)
        if not any("quant_start_step" in rule for rule in self.config):
            assert same_bits(self.output(self.model), quantized), "a loaded calibration computes something else"

    def _assert_float(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            assert type(module) is self.classes[name], f"{name} is a {type(module).__name__}"
            assert not module._forward_hooks and not module._forward_pre_hooks, f"{name} has a hook"
            assert CHILD_NAME not in module._modules and not parametrize.is_parametrized(module), name
        assert not model._load_state_dict_pre_hooks and not model._state_dict_hooks
        assert list(model.state_dict()) == self.float_names
