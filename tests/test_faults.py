"""What happens to a quantized model beside training: changes, copies, a lost quantizer, a crash. Works, or says why."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quantkern.config import ConfigError
from quantkern.quantizers import BNNQuantizer, DoReFaQuantizer, LsqQuantizer, NaiveQuantizer, QAT_Quantizer

RULE = {"quant_types": ["weight", "input", "output"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]}
BATCH_NORM = {"dummy_input": torch.zeros(2, 1, 6, 6)}  # is folded into conv
CASES: dict[str, tuple[type[Any], dict[str, Any], dict[str, Any]]] = {
    "qat": (QAT_Quantizer, {**RULE, "quant_start_step": 2}, {}),
    "qat folded": (QAT_Quantizer, RULE, {**BATCH_NORM, "freeze_bn_step": 5}),
    "lsq": (LsqQuantizer, {**RULE, "quant_bits": 4, "quant_start_step": 2}, {}),
    "lsq folded": (LsqQuantizer, {**RULE, "quant_bits": 4}, BATCH_NORM),
    "dorefa": (DoReFaQuantizer, {**RULE, "quant_types": ["weight", "input", "gradient"], "quant_bits": 4}, {}),
    "naive": (NaiveQuantizer, {**RULE, "quant_types": ["weight"]}, {}),
    "bnn": (BNNQuantizer, {**RULE, "quant_types": ["weight", "input"], "quant_bits": 1}, {}),
}
every_case = pytest.mark.parametrize("case", CASES)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu().flatten(1)
        return self.last(self.first(x).relu())


def start(case: str) -> tuple[Net, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    kind, rule, settings = CASES[case]
    return model, optimizer, kind(model, [rule], optimizer, **settings)


def batch(seed: int) -> Tensor:
    return torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        loss = (model(batch(seed)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same_state(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


def replace_layer(model: Net) -> None:
    model.last = nn.Linear(32, 3)


def replace_norm(model: Net) -> None:
    model.bn = nn.BatchNorm2d(4)


def strip_weight(model: Net) -> None:
    parametrize.remove_parametrizations(model.last, "weight")


def strip_tensors(model: Net) -> None:
    del model.last.quantkern


CHANGES = {
    "layer": (replace_layer, "layer 'last' is no longer part of the model", tuple(CASES)),
    "norm": (replace_norm, "the batch norm folded into layer 'conv' is no longer", ("qat folded", "lsq folded")),
    "weight": (strip_weight, "the fake-quantizers of layer 'last' were taken off it", tuple(CASES)),
    "tensors": (strip_tensors, "of layer 'last' were taken off it", tuple(case for case in CASES if case != "naive")),
}


@pytest.mark.parametrize(("case", "change"), [(case, change) for change in CHANGES for case in CHANGES[change][2]])
def test_a_model_changed_after_quantization_is_refused(case: str, change: str, tmp_path: Path) -> None:
    """The layers that are left could go on, but what would be exported is not what the rules say."""
    model, optimizer, quantizer = start(case)
    train(model, optimizer, range(3))
    CHANGES[change][0](model)
    kinds = [type(module) for module in model.modules()]
    calls: dict[str, Callable[[], object]] = {
        "export_model": lambda: quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt"),
        "compress": quantizer.compress,
        "report": quantizer.report,
        "load_calibration_config": lambda: quantizer.load_calibration_config({"conv": {}}),
    }
    for method, call in calls.items():
        with pytest.raises(RuntimeError) as error:
            call()
        text = str(error.value)
        assert text.startswith(f"{method}(): the model was changed after") and CHANGES[change][1] in text
        assert "Put back what was there" in text
    assert not any(tmp_path.iterdir()) and [type(module) for module in model.modules()] == kinds


@every_case
def test_a_replaced_layer_is_noticed_in_training(case: str) -> None:
    model, optimizer, _ = start(case)
    train(model, optimizer, range(4))
    replace_layer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(batch(0))
    model.train()
    with pytest.warns(UserWarning, match="^'last' replaced after quantization: what took the place trains in float"):
        model(batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(2))


@every_case
def test_a_layer_put_back_is_no_change(case: str, tmp_path: Path) -> None:
    model, optimizer, quantizer = start(case)
    train(model, optimizer, range(3))
    kept = model.last
    replace_layer(model)
    model.last = kept
    quantizer.export_model(tmp_path / "model.pt")
    assert type(model.last) is nn.Linear


@every_case
def test_a_weight_can_be_registered_anew(case: str, tmp_path: Path) -> None:
    """As in the float model: it is the new weight that is quantized, trained by a new optimizer and exported."""
    model, optimizer, quantizer = start(case)
    train(model, optimizer, range(3))
    new, bias = nn.Parameter(torch.linspace(-0.05, 0.05, 96).view(3, 32)), nn.Parameter(torch.zeros(3))
    model.last.weight, model.last.bias = new, bias
    assert model.last.parametrizations.weight.original is new
    before, quantized = new.detach().clone(), model.last.weight.detach().clone()
    assert not isinstance(model.last.weight, nn.Parameter) and not torch.equal(quantized, before)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert not torch.equal(new, before) and bias.all()
    quantizer.export_model(tmp_path / "model.pt")
    assert model.last.weight is new and list(model.last._parameters) == ["weight", "bias"]
    assert torch.equal(torch.load(tmp_path / "model.pt")["last.weight"], new)


def test_what_others_parametrize_is_registered_as_ever() -> None:
    model = Net()
    parametrize.register_parametrization(model.last, "bias", nn.Identity())
    NaiveQuantizer(model)
    with pytest.raises(KeyError, match="attribute 'bias' already exists"):
        model.last.bias = nn.Parameter(torch.zeros(3))
    model.last.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    assert "extra" in dict(model.last.named_parameters())


@every_case
def test_states_that_are_assigned_train_as_copied_ones(case: str) -> None:
    """``load_state_dict(assign=True)`` registers every parameter and buffer anew."""
    model, optimizer, _ = start(case)
    train(model, optimizer, range(3))
    state = model.state_dict()
    runs = []
    for assign in (False, True):
        other, _, _ = start(case)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        torch.manual_seed(1)
        runs.append((other, train(other, torch.optim.SGD(other.parameters(), lr=0.1), range(3, 6))))
    assert runs[0][1] == runs[1][1] and same_state(runs[0][0], runs[1][0])


@every_case
def test_a_second_compress_and_a_second_quantizer(case: str) -> None:
    model, optimizer, quantizer = start(case)
    twin, twin_optimizer, _ = start(case)
    assert quantizer.compress() is model and quantizer.compress() is model
    kind, rule, settings = CASES[case]
    with pytest.raises(ConfigError, match="layer 'conv' has a quantizer already; export_model"):
        kind(model, [rule], optimizer, **settings)
    runs = []
    for one, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        torch.manual_seed(1)
        runs.append(train(one, its_optimizer, range(4)))
    assert runs[0] == runs[1] and same_state(model, twin)


@every_case
def test_a_model_lives_without_its_quantizer(case: str) -> None:
    """Delays, frozen statistics and clipped weights go on; the quantizer itself is not kept alive."""
    model, optimizer, quantizer = start(case)
    kept, kept_optimizer, _keeper = start(case)
    reference = weakref.ref(quantizer)
    del quantizer
    gc.collect()
    assert reference() is None
    runs = []
    for one, its_optimizer in ((model, optimizer), (kept, kept_optimizer)):
        torch.manual_seed(1)
        runs.append(train(one, its_optimizer, range(7)))
    assert runs[0] == runs[1] and same_state(model, kept)
    assert torch.equal(model.eval()(batch(9)), kept.eval()(batch(9)))


@every_case
def test_copies_go_on_as_the_original_would(case: str, tmp_path: Path) -> None:
    model, optimizer, quantizer = start(case)
    train(model, optimizer, range(3))
    both, of_model = copy.deepcopy((quantizer, optimizer)), copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    runs = []
    for one in (both[0].bound_model, of_model):
        torch.manual_seed(1)
        runs.append(train(one, torch.optim.SGD(one.parameters(), lr=0.1), range(3, 6)))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.manual_seed(1)
    runs.append(train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3, 6)))
    assert runs[0] == runs[1]
    if not any(
        hook for hook in optimizer._optimizer_step_post_hooks
    ):  # another optimizer counts no steps, clips nothing
        assert runs[2] == runs[0]
    both[0].export_model(tmp_path / "copy.pt")
    assert "Parametrized" in type(model.last).__name__ and type(both[0].bound_model.last) is nn.Linear
    quantizer.export_model(tmp_path / "model.pt")


def test_a_copy_shares_its_ranges_on_its_own() -> None:
    _, _, quantizer = start("qat")
    twin = copy.deepcopy(quantizer)
    twin.share_ranges(False)
    hooks = [one.bound_model._forward_hooks.values() for one in (quantizer, twin)]
    sharing = [[hook.enabled for hook in own if hasattr(hook, "enabled")] for own in hooks]
    assert sharing == [[True], [False]]


@every_case
@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickles_of_quantized_weights_say_what_to_do(case: str, save: Callable[[nn.Module], object]) -> None:
    """torch pickles no parametrized module and names the way: the state_dict."""
    model, optimizer, _ = start(case)
    train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match=r"parametrized modules is only supported through state_dict\(\)"):
        save(model)


@pytest.mark.parametrize("case", ["qat", "lsq"])
def test_models_without_quantized_weights_pickle_and_go_on(case: str) -> None:
    torch.manual_seed(0)
    kind, rule, _ = CASES[case]
    model = Net()
    kind(model, [{**rule, "quant_types": ["input", "output"], "quant_start_step": 0}])
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    again = pickle.loads(pickle.dumps(model))
    runs = [train(one, torch.optim.SGD(one.parameters(), lr=0.1), range(2, 5)) for one in (model, again)]
    assert runs[0] == runs[1] and same_state(model, again)


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save({**state, "random": torch.get_rng_state()}, path)


def run_into_a_crash(folder: Path) -> None:
    """Every quantizer: a checkpoint after step 3, five more steps, and the end before the next checkpoint."""
    runs = {}
    for case in CASES:
        model, optimizer, _ = start(case)
        losses = train(model, optimizer, range(3))
        save_checkpoint(folder / f"{case}.pt", model, optimizer, 3)
        runs[case] = losses + train(model, optimizer, range(3, 8))
    torch.save(runs, folder / "losses.pt")
    sys.stdout.flush()
    raise SystemExit(9)  # no exit code of Python's own


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crash")
    code = f"import pathlib, test_faults; test_faults.run_into_a_crash(pathlib.Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    return folder


@every_case
def test_a_run_resumed_after_a_crash_repeats_its_losses(crashed: Path, case: str) -> None:
    """The optimizer has stepped since the checkpoint; a new process repeats these steps with the same bits."""
    expected = torch.load(crashed / "losses.pt", weights_only=True)[case]
    state = torch.load(crashed / f"{case}.pt", weights_only=True)
    model, optimizer, _ = start(case)
    model.load_state_dict(state["model"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    assert train(model, optimizer, range(state["step"], 8)) == expected[3:]
    torch.manual_seed(0)
    assert len(set(expected)) == 8 and expected[3:] != train(Net(), optimizer, range(5))
