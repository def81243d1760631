"""benchmarks.train_step: every contestant trains, what is counted is right, and the tables say what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that the installed quantkern is the one tested

from benchmarks import (  # noqa: E402
    allocations,
    harness,
    networks,
    quantized_networks,
    report,
    step_memory,
    step_profile,
    tables,
    train_step,
)
from benchmarks.networks import NETWORKS, Network  # noqa: E402
from benchmarks.quantized_networks import BUILT_IN, COMPILED, INSTALLABLE, Trainee  # noqa: E402

CPU = torch.device("cpu")


class Small(nn.Module):
    """A convolution with batch norm, an activation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.relu(self.norm(self.conv(x))), 1))  # type: ignore[no-any-return]


SMALL = networks.convolutional("small", Small, 4, (3, 8, 8))
LINEAR = Network(
    "linear", lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10)), 4, (16,), ("Linear",)
)


def entry(name: str, build: quantized_networks.Build, network: Network = SMALL) -> train_step.Entry:
    return train_step.Entry(name, build, network, CPU, accumulate=1)


def float_loss(network: Network = SMALL) -> float:
    return float(quantized_networks.train_step(BUILT_IN["float"](network, CPU), [network.draw(CPU)]))


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_contestant_trains_near_float_and_is_measured(name: str) -> None:
    one = entry(name, BUILT_IN[name])
    verdict = one.check(float_loss)
    assert verdict.accepted, verdict.text
    assert verdict.figures["weights_without_gradient"] == 0
    assert verdict.figures["last_loss"] < verdict.figures["first_loss"]
    assert 0 < verdict.figures["saved_bytes"] < verdict.figures["peak_bytes"]
    before = [parameter.detach().clone() for parameter in one.trainee.model.parameters()]
    one.run()
    assert not all(torch.equal(old, new) for old, new in zip(before, one.trainee.model.parameters(), strict=True))
    assert verdict.other_work == (quantized_networks.FOLDS if name.endswith("folded") else "")


@pytest.mark.parametrize("package", INSTALLABLE)
def test_other_libraries_train(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    for name, build in INSTALLABLE[package].items():
        network = LINEAR if package == "torchao" else SMALL
        verdict = entry(name, build, network).check(lambda network=network: float_loss(network))
        assert verdict.accepted, (name, verdict.text)
        assert ("no gradient reaches the weights of 2 layers" in verdict.other_work) == (name == "nni-lsq")


def test_a_network_starts_from_the_same_numbers_and_draws_the_same_batch() -> None:
    for network in NETWORKS.values():
        first, second = (network.build(CPU).state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        x, y = network.draw(CPU)
        assert x.shape == (network.batch, *network.shape) and y.shape == (network.batch,)
        assert torch.equal(x, network.draw(CPU)[0]) and not torch.equal(x, network.draw(CPU, seed=1)[0])
        types = {type(module).__name__ for module in network.build(CPU).modules()}
        assert set(network.layers) <= types


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "transformer"])
def test_networks_give_scores_and_every_weight_a_gradient(name: str) -> None:
    network = NETWORKS[name]
    model = network.build(CPU)
    x, _ = network.draw(CPU, batch=2)
    scores = model(x)
    assert scores.shape == (2, 10)
    scores.square().sum().backward()
    assert step_memory.weights_without_gradient(model) == 0


def test_the_width_of_a_resnet_is_that_of_the_paper() -> None:
    convolutions = [one for one in networks.ResNet18().modules() if isinstance(one, nn.Conv2d)]
    assert len(convolutions) == 1 + 16 + 3
    assert convolutions[-1].out_channels == 512
    assert sum(one.numel() for one in networks.ResNet18(classes=10).parameters()) == 11_173_962


def test_a_contestant_that_does_not_quantize_is_found() -> None:
    verdict = entry("impostor", BUILT_IN["float"]).check(float_loss)
    assert not verdict.accepted and "quantizes nothing" in verdict.text


def test_a_contestant_that_trains_something_else_is_found() -> None:
    def other(network: Network, device: torch.device) -> Trainee:
        trainee = BUILT_IN["quantkern-qat"](network, device)
        with torch.no_grad():
            trainee.model.fc.parametrizations.weight.original.mul_(20)
        return trainee

    verdict = entry("other", other).check(float_loss)
    assert not verdict.accepted and "does not train as float does" in verdict.text


def test_weights_that_receive_no_gradient_are_told() -> None:
    def frozen(network: Network, device: torch.device) -> Trainee:
        trainee = BUILT_IN["quantkern-qat"](network, device)
        trainee.model.norm.register_full_backward_hook(lambda *_: (torch.zeros(4, 8, 8, 8),))
        return trainee

    verdict = entry("frozen", frozen).check(float_loss)
    assert verdict.accepted and verdict.other_work == "no gradient reaches the weights of 1 layers"


class KeepsHidden(torch.autograd.Function):
    """Keeps a tensor where saved_tensors_hooks do not look."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.hidden = x * 2  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.hidden  # type: ignore[attr-defined,no-any-return]


def trainee_of(model: nn.Module) -> Trainee:
    return Trainee(model, quantized_networks.sgd(model), model)


def saved_by(model: nn.Module, x: Tensor) -> float:
    batch = [(x, torch.zeros(len(x), dtype=torch.long))]
    return step_memory.measure(lambda: trainee_of(model), batch, CPU)[1]["saved_bytes"]


def test_everything_that_is_kept_for_the_backward_is_counted() -> None:
    class Hidden(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return KeepsHidden.apply(super().forward(x))  # type: ignore[no-any-return,no-untyped-call]

    x = torch.randn(64, 32)
    plain, hidden = (saved_by(kind(32, 100), x) for kind in (nn.Linear, Hidden))
    scores = 64 * 100 * 4
    assert scores <= plain < 2 * scores  # what the loss keeps, and a little
    assert hidden - plain == scores


def test_our_masks_of_one_bit_are_counted() -> None:
    # At the end of the forward ours keeps besides what float does a quantized input and weight, and a mask; of the
    # second input, which float keeps whole, a byte an element, a scale, a zero point and a flag.
    x = torch.randn(64, 32)
    rules = [
        {
            "quant_types": ["weight", "input"],
            "quant_bits": 8,
            "quant_scheme": {"weight": "per_tensor_symmetric", "input": "per_tensor_affine"},
            "quant_dtype": {"weight": "int", "input": "uint"},
            "op_types": ["Linear"],
        }
    ]

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 10))

    quantized = network()
    quantized_networks.QAT_Quantizer(quantized, rules).compress()
    more = saved_by(quantized, x) - saved_by(network(), x)
    # The first input needs no gradient: it has no mask, and the first weight is not kept.
    first_input, second_mask, second_weight = x.nbytes, 64 * 128 // 8, 4 * 128 * 10
    codes, whole = 64 * 128 + 3 * 4, 64 * 128 * 4
    assert more == first_input + second_mask + second_weight + codes - whole


def test_the_peak_of_a_step_holds_state_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 10))
    batch = [(torch.randn(4, 256), torch.zeros(4, dtype=torch.long))]
    figures = step_memory.measure(lambda: trainee_of(model), batch, CPU)[1]
    weights = sum(one.nbytes for one in model.parameters())
    # The parameters were there before; momentum came with the first step, gradients go and come.
    assert figures["state_bytes"] == weights
    assert 2 * weights <= figures["peak_bytes"] < 2.1 * weights


def memory_event(time: float, address: int, size: int) -> dict[str, object]:
    return {"name": "[memory]", "ts": time, "args": {"Addr": address, "Bytes": size}}


def test_memory_over_time() -> None:
    events = [
        memory_event(3, 1, -100),
        memory_event(1, 1, 100),
        memory_event(2, 2, 50),
        memory_event(4, 9, -70),  # was there before
        {"name": "aten::add", "ts": 5},
    ]
    assert step_memory.bytes_over_time(events) == [(1, 100), (2, 150), (3, 50), (4, 50)]


def test_operators_are_counted() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    _, events = allocations.traced(lambda: (x @ x).sum().backward(), memory=False)
    names = {one["name"] for one in events if step_memory.is_operator(one)}
    assert {"aten::matmul", "aten::mm", "aten::sum"} <= names
    assert not any("Backward" in name or "autograd" in name for name in names)


def test_the_time_of_an_operator_is_without_that_of_those_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, start: float, length: float, kind: str = "cpu_op") -> dict[str, object]:
        return {"name": name, "ts": start, "dur": length, "cat": kind}

    events = [
        event(step_memory.STEP, 10, 9000, "user_annotation"),
        event("aten::outer", 1000, 5000),
        event("aten::inner", 1000, 2000),
        event("aten::inner", 4000, 1000),
        event("aten::innermost", 4500, 500),
        event("aten::inner", 7000, 1000),
        event("aten::outer", 9999, 1),  # after the step
    ]
    monkeypatch.setattr(allocations, "traced", lambda run, memory: (run(), events))
    assert step_profile.operator_times(lambda: None) == {
        "aten::outer": (1, 2.0),
        "aten::inner": (3, 3.5),
        "aten::innermost": (1, 0.5),
    }


@pytest.mark.parametrize("name", ["quantkern-qat", "quantkern-lsq"])
def test_the_profile_times_every_tensor_and_leaves_the_model_as_it_was(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spans = step_profile.show(SMALL, name, BUILT_IN["float"], BUILT_IN[name], CPU, steps=2)
    assert set(spans) == {"conv.weight", "conv.input", "fc.weight", "fc.input", "relu.output"}
    assert all(len(one.forward) == 2 for one in spans.values())
    assert all(one.forward_ms > 0 for one in spans.values())
    backwards = {label for label, one in spans.items() if one.backward}
    assert backwards >= {"conv.weight", "fc.weight", "fc.input", "relu.output"}
    elements = 4 * 8 * 8 * 8
    activation = 20 * elements if name == "quantkern-lsq" else 16.25 * elements
    assert spans["relu.output"].floor_bytes == spans["fc.input"].floor_bytes == activation
    assert spans["conv.weight"].floor_bytes == 8 * 27 * (20 if name == "quantkern-lsq" else 8)
    printed = capsys.readouterr().out
    assert "4x8x8x8" in printed and "elsewhere" in printed and "quantkern::" in printed
    trainee = BUILT_IN[name](SMALL, CPU)
    with step_profile.watched(trainee.model):
        pass
    assert not any("forward" in vars(module) for module in trainee.model.modules())


def small_run(path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(train_step, "NETWORKS", {"lenet": SMALL, "transformer": LINEAR})
    monkeypatch.setattr(quantized_networks, "LEARNING_RATE", 0.001)
    options = "--networks lenet,transformer --contestants quantkern-qat,quantkern-lsq,quantkern-qat-folded --steps 2"
    threads = torch.get_num_threads()
    try:
        train_step.main([*options.split(), "--seconds", "0", "--threads", "1", "--json", str(path), *more])
    finally:
        torch.set_num_threads(threads)


def test_whole_run_writes_its_results_and_the_readme_s_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train-step-cpu.json"
    small_run(path, monkeypatch)
    document, results, excluded = harness.read_json(path)
    assert document["benchmark"] == "train_step" and document["arguments"]["steps"] == 2
    assert {"nni", "brevitas", "torchao"} <= set(document["versions"])
    assert [(one.labels["network"], one.contestant) for one in excluded] == [("linear", "quantkern-qat-folded")]
    assert "no batch norm" in excluded[0].reason
    assert len(results) == 7
    for one in results:
        assert one.samples >= 2 and one.to_floor is not None and one.round_to_floor is not None
        if one.contestant == "float":
            assert one.to_floor == one.round_to_floor == 1
    assert "x float, rounds" in capsys.readouterr().out
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    text = report.update("<!-- table: train-step-cpu -->\nstale\n<!-- end -->\n")
    assert "stale" not in text and document["commit"]["hash"][:10] in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["time of a step", "float, ms", "our QAT", "our QAT, batch norm folded", "our LSQ"]
    assert [row[0] for row in rows] == [
        *("time of a step", "small, batch 4", "linear, batch 4"),
        *("peak memory", "small, batch 4", "linear, batch 4"),
        *("kept for the backward, MB", "small, batch 4", "linear, batch 4"),
    ]
    by_name = {one.contestant: one for one in results if one.labels["network"] == "small"}
    qat, plain = by_name["quantkern-qat"], by_name["float"]
    assert rows[1][2] == f"{qat.p50_ms / plain.p50_ms:.2f}x" and rows[1][3].endswith("x*") and rows[2][3] == ""
    assert rows[4][2] == f"{qat.figures['peak_bytes'] / plain.figures['peak_bytes']:.2f}x"
    assert rows[7][1] == tables.figure(plain.figures["saved_bytes"] / 1e6)
    assert f"\\* quantkern-qat-folded: {quantized_networks.FOLDS}" in text


@pytest.mark.parametrize("name", ["quantkern-qat", "quantkern-lsq"])
def test_micro_batches_of_ours_quantize_the_weights_once(name: str) -> None:
    trainee = BUILT_IN[name](SMALL, CPU)
    batches = [SMALL.draw(CPU, seed) for seed in range(4)]
    quantized_networks.train_step(trainee, batches)
    with torch.profiler.profile() as profile:
        quantized_networks.train_step(trainee, batches)
    calls = {one.key: one.count for one in profile.key_averages()}
    operation = "lsq" if "lsq" in name else "fake_quantize"
    assert calls[f"quantkern::{operation}_weights_forward"] == 1
    layers = sum(hasattr(module, "parametrizations") for module in trainee.model.modules())
    assert calls[f"quantkern::{operation}_again"] == len(batches) * layers


def test_micro_batches_make_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    small_run(path, monkeypatch, "--accumulate", "3")
    document, results, _ = harness.read_json(path)
    assert document["arguments"]["accumulate"] == 3
    assert {one.labels["micro-batches"] for one in results} == {"3"}
    trainee = BUILT_IN["float"](SMALL, CPU)
    batches = [SMALL.draw(CPU, seed) for seed in range(3)]
    steps: list[int] = []
    trainee.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    quantized_networks.train_step(trainee, batches)
    assert len(steps) == 1
    gradient = trainee.model.fc.weight.grad
    fresh = SMALL.build(CPU)
    means = [torch.nn.functional.cross_entropy(fresh(x), y) for x, y in batches]
    (torch.stack(means).mean()).backward()
    assert torch.allclose(gradient, fresh.fc.weight.grad, atol=1e-6)


def test_compiled_contestants_take_part_where_they_are_named() -> None:
    assert not set(COMPILED) & set(train_step.contestants_for(None))
    chosen = train_step.contestants_for(["quantkern-qat-compiled"])
    assert list(chosen) == ["float", "quantkern-qat-compiled"]
    assert set(COMPILED) <= set(report.STEP_SHOWN)
    assert set(BUILT_IN) - {"float"} <= set(report.STEP_SHOWN)
    assert {name for builds in INSTALLABLE.values() for name in builds} <= set(report.STEP_SHOWN)


def test_a_compiled_trainee_takes_a_step_before_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    trainee = COMPILED["quantkern-lsq-compiled"](SMALL, CPU)
    assert all(bool(one.initialized) for one in trainee.model.modules() if hasattr(one, "initialized"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--networks", "lenett"], "lenett"), (["--steps", "0"], "from 1 up"), (["--accumulate", "x"], "from 1 up")],
)
def test_unknown_choices_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main(arguments)
    assert message in capsys.readouterr().err


def test_unknown_contestant_is_named() -> None:
    with pytest.raises(SystemExit, match="nobody"):
        train_step.main(["--contestants", "quantkern-qat,nobody"])
