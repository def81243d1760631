"""Autocast, loss scaling, half-precision models, and training steps that wait for no device, with every quantizer."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from quantizer_checks import NoReads
from test_compile import BOTH, DELAY, TRAINED, Attach, batch, lsq, net, qat, rules
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantkern import ObserverQuantizer, QAT_Quantizer
from quantkern.attach import fake_quants
from quantkern.fake_quant import FakeQuant

HALVES = [torch.bfloat16, torch.float16]
EVERY: dict[str, Attach] = {
    **TRAINED,
    "qat-freezing": qat(True, freeze=DELAY),
    "lsq-delayed": lsq(quant_start_step=DELAY + 1),
    "lsq-freezing-delayed": lsq(True, freeze=DELAY, quant_start_step=DELAY + 1),
}
LAYERS = ("conv", "deep", "fc")


def quantized(name: str, steps: int = 1, given: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that was trained for some steps: learned scales and ranges have started."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    EVERY[name](model, optimizer if given else None)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        model(batch(seed)).square().mean().backward()
        optimizer.step()


def modules_of(model: nn.Module) -> list[FakeQuant]:
    return [module for module in model.modules() if isinstance(module, FakeQuant)]


def same(a: nn.Module, b: nn.Module) -> None:
    state = b.state_dict()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)


# ---------------------------------------------------------------- the host waits for nothing


@pytest.mark.parametrize("given", [True, False], ids=["optimizer", "forwards"])
@pytest.mark.parametrize("name", EVERY)
def test_a_step_never_waits_for_the_device(name: str, given: bool) -> None:
    """Delays and their ends included; a learned scale alone reads its first tensor, once in its life."""
    starts = {True: DELAY + 1 if "delayed" in name else 0}.get("lsq" in name)
    model, optimizer = quantized(name, 0, given)
    for seed in range(6):
        if seed == starts:
            with pytest.raises(AssertionError, match="read back"), NoReads():
                model(batch(seed))
            train(model, optimizer, range(seed, seed + 1))
        else:
            with NoReads():
                train(model, optimizer, range(seed, seed + 1))
    counters = [module.step for module in modules_of(model) if module.step is not None]
    assert all(module.steps_done == int(module.step) for module in modules_of(model) if module.step is not None)
    assert bool(counters) == ("delayed" in name or "freezing" in name)
    model.eval()
    with NoReads():
        model(batch(9))


@pytest.mark.parametrize("name", ["lsq-delayed", "lsq-freezing-delayed", "qat-freezing"])
@pytest.mark.parametrize("at", [1, DELAY, DELAY + 2])
def test_the_host_counts_on_after_a_resume(name: str, at: int) -> None:
    first, optimizer = quantized(name, at)
    second, other = quantized(name, 0)
    if at < DELAY + 2:  # what the second has learned by itself does not count
        train(second, other, range(40, 40 + DELAY + 2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [module.steps_done for module in modules_of(second)] == [module.steps_done for module in modules_of(first)]
    for model, own in ((first, optimizer), (second, other)):
        train(model, own, range(at, at + 4))
    same(first, second)
    twin = copy.deepcopy(first)
    assert [module.steps_done for module in modules_of(twin)] == [module.steps_done for module in modules_of(first)]


def test_a_replica_asks_the_device() -> None:
    """It is made anew for every forward, and what it counts on the host is lost with it."""
    model = nn.Sequential(nn.Linear(3, 2))
    lsq(quant_start_step=2)(model, None)
    own = model[0].quantkern.input
    x = torch.randn(4, 3)
    for seen in range(3):
        replica = own._replicate_for_data_parallel()
        for key, value in {**own._parameters, **own._buffers}.items():  # as torch.nn.parallel.replicate does
            setattr(replica, key, None if value is None else value.detach().clone())
        assert torch.equal(replica(x), x) == (seen < 2)
        own.step.add_(1)


# ---------------------------------------------------------------- half-precision models


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [name for name in TRAINED if "folded" not in name])
def test_half_models_round_once(name: str, dtype: torch.dtype) -> None:
    """Every tensor of a half model is the float32 quantization of the same values, rounded to the model's type."""
    half, _ = quantized(name, DELAY + 1)
    half.to(dtype)
    whole = copy.deepcopy(half).float()
    states = [{k: v.dtype for k, v in module.state_dict().items()} for module in modules_of(half)]
    assert states == [{k: v.dtype for k, v in module.state_dict().items()} for module in modules_of(whole)]
    assert not any(dtype in state.values() for state in states)
    for layer in LAYERS:
        mine, other = half.get_submodule(layer), whole.get_submodule(layer)
        assert mine.weight.dtype is dtype and torch.equal(mine.weight, other.weight.to(dtype))
        if "quantkern" not in mine._modules:
            continue
        for kind, module in mine.quantkern.named_children():
            x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
            x = x if layer == "fc" and kind == "input" else x[:, :3] if layer == "fc" else x.view(6, 4, 4, 4)
            x = x[:, :2] if (layer, kind) == ("conv", "input") else x
            xs = [value.detach().requires_grad_() for value in (x, x.float())]
            ys = [module(xs[0]), getattr(other.quantkern, kind)(xs[1])]
            assert ys[0].dtype is dtype and torch.equal(ys[0], ys[1].to(dtype)), (layer, kind)
            if kind != "gradient":
                for y in ys:
                    y.sum().backward()
                assert xs[0].grad.dtype is dtype and torch.equal(xs[0].grad, xs[1].grad.to(dtype)), (layer, kind)
    for mine, other in zip(modules_of(half), modules_of(whole), strict=True):
        same(mine, other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_half_models_train(name: str, dtype: torch.dtype) -> None:
    model, optimizer = quantized(name, DELAY + 2)
    model.to(dtype)
    for seed in range(3):
        optimizer.zero_grad()
        output = model(batch(seed).to(dtype))
        assert output.dtype is dtype
        output.float().square().mean().backward()
        assert all(p.grad is None or (p.grad.dtype is p.dtype and p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    assert model.eval()(batch(8).to(dtype)).isfinite().all()


# ---------------------------------------------------------------- autocast


class Calls(TorchDispatchMode):
    """What ran, with the type and the shape of its first tensor, and the type of what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        name = func.overloadpacket.__name__
        if name.endswith("_weights_forward"):  # of many tensors into many others
            for x, y in zip(args[0], args[1], strict=True):
                self.seen[name.replace("weights", "weight"), x.dtype, tuple(x.shape), y.dtype] += 1
        elif args and isinstance(args[0], Tensor) and isinstance(first, Tensor):
            self.seen[name, args[0].dtype, tuple(args[0].shape), first.dtype] += 1
        return out


OF_WEIGHTS = {"qat": "fake_quantize_weight_forward", "lsq": "lsq_forward", "dorefa": "dorefa_weight_forward",
              "bnn": "binarize_forward", "naive": "fake_quantize_weight_forward"}  # fmt: skip


IN_ONE_PASS = ("qat", "qat-channels", "lsq", "naive")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [*IN_ONE_PASS, "qat-folded", "lsq-folded", "dorefa", "bnn"])
def test_autocast_quantizes_a_weight_once(name: str, dtype: torch.dtype) -> None:
    """The grid is that of the float32 weight. What a product takes is of its type at once; outputs keep their type."""
    model, _ = quantized(name)
    with torch.autocast("cpu", dtype), Calls() as calls:
        output = model(batch(0))
    assert output.dtype is dtype
    for layer in ("deep", "fc"):
        plain = name in IN_ONE_PASS or (layer == "fc" and name in ("qat-folded", "lsq-folded"))
        out = dtype if plain else torch.float32
        shape = tuple(model.get_submodule(layer).weight.shape)
        operation = OF_WEIGHTS[name.split("-")[0]]
        assert sum(calls.seen[one, torch.float32, shape, out] for one in {operation, "lsq_weight_forward"}) == 1
        assert calls.seen["_to_copy", torch.float32, shape, dtype] == (out is torch.float32)
    kinds = ("fake_quantize_activation_forward", "lsq_forward", "dorefa_activation_forward", "binarize_forward")
    quantizing = {key: count for key, count in calls.seen.items() if key[0] in kinds}
    narrowed = {key for key in quantizing if key[1] is not key[3]}
    assert all(key[1] is torch.float32 and key[3] is dtype for key in narrowed)
    if name in IN_ONE_PASS and name != "naive":
        images = tuple(batch(0).shape)
        assert any(key[2] == images for key in narrowed)
        assert calls.seen["_to_copy", torch.float32, images, dtype] == 0
    if name != "naive":
        assert any(key[1] is dtype for key in quantizing)
    output.float().square().mean().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert all(value.dtype is not dtype for value in model.state_dict().values())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_a_weight_cast_in_its_pass_is_one_cast_later(name: str, dtype: torch.dtype) -> None:
    """Outputs, gradients and state are the same bits, also with a layer that autocast does not reach."""

    def run(together: bool) -> tuple[list[Tensor], dict[str, Tensor], Counter[tuple[Any, ...]]]:
        model, optimizer = quantized(name)
        forward = model.deep.forward

        def in_float32(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return forward(x.float())  # type: ignore[no-any-return]

        outputs = []
        for seed in range(1, 4):
            if seed == 2:
                model.deep.forward = in_float32
            if not together:
                for module in modules_of(model):
                    module.narrows = False
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype), Calls() as calls:
                outputs.append(model(batch(seed)))
            outputs[-1].float().square().mean().backward()
            optimizer.step()
        return outputs, model.state_dict(), calls.seen

    ours, state, seen = run(True)
    later, other, casts = run(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, later, strict=True))
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    halved = [sum(n for key, n in c.items() if key[0] == "_to_copy" and key[3] is dtype) for c in (seen, casts)]
    assert halved[0] < halved[1]


def test_a_kept_weight_serves_the_type_it_is_asked_for() -> None:
    """A float32 result serves an autocast region too, which casts it; a narrow one serves nobody else."""
    model = net()
    quantizer = QAT_Quantizer(model, rules(["weight"]))
    model(batch(0)).sum().backward()
    expected = model.fc.weight.detach()
    with quantizer.reuse_weights(), torch.no_grad():
        for kept in (torch.bfloat16, torch.float32):
            with torch.autocast("cpu", torch.bfloat16):
                model(batch(0))
                assert model.fc.weight.dtype is kept and torch.equal(model.fc.weight.bfloat16(), expected.bfloat16())
            model(batch(0))
            assert torch.equal(model.fc.weight, expected)


@pytest.mark.parametrize("name", ["qat", "lsq", "qat-folded", "lsq-folded", "dorefa"])
def test_autocast_is_near_float32(name: str) -> None:
    """bfloat16 keeps 8 bits: 5% of the largest output here, or a neighbour on the output's grid if that is coarse."""
    model, _ = quantized(name, 3)
    model.eval()
    with torch.no_grad():
        exact = model(batch(5))
        with torch.autocast("cpu", torch.bfloat16):
            near = model(batch(5)).float()
    step = float(getattr(model.fc.quantkern.output, "scale", torch.zeros(())).detach())
    largest = float(exact.abs().max())
    assert 0 < (near - exact).abs().max() < max(0.05 * largest, step + largest / 256)


def test_observers_under_autocast() -> None:
    model = net().eval()
    quantizer = ObserverQuantizer(model, rules(BOTH, observer="minmax"))
    with torch.autocast("cpu", torch.bfloat16):
        quantizer.calibrate([batch(0), batch(1)], progress=False)
    quantizer.compress()
    exact = model(batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch(0))
    assert output.dtype is torch.bfloat16
    assert (output - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(
        module.scale.dtype is torch.float32 for layer in LAYERS for module in fake_quants(model.get_submodule(layer))
    )


# ---------------------------------------------------------------- loss scaling


@pytest.mark.parametrize("name", EVERY)
def test_a_scaled_loss_gives_the_same_training(name: str) -> None:
    """Scales are powers of two: nothing rounds differently, learned scales and quantized gradients included."""
    plain, own = quantized(name)
    scaled, optimizer = quantized(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(plain, own, range(1, 5))
    for seed in range(1, 5):
        optimizer.zero_grad()
        scaler.scale(scaled(batch(seed)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    same(plain, scaled)


@pytest.mark.parametrize("name", EVERY)
def test_an_overflow_skips_the_step_and_its_count(name: str) -> None:
    model, optimizer = quantized(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    counts = [module.steps_done for module in modules_of(model)]
    optimizer.zero_grad()
    (scaler.scale(model(batch(1)).square().mean()) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert [module.steps_done for module in modules_of(model)] == counts
    assert all(int(module.step) == module.steps_done for module in modules_of(model) if module.step is not None)
    train(model, optimizer, range(2, 4))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["qat", "qat-folded-delayed", "lsq", "lsq-offset", "dorefa", "bnn"])
def test_float16_training_with_a_scaler(name: str) -> None:
    model, optimizer = quantized(name)
    for group in optimizer.param_groups:
        group["lr"] = 0.001 if name == "bnn" else group["lr"]  # its outputs are sums of +-1, and large
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (model(batch(3)).float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
