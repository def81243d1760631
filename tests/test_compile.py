"""torch.compile(fullgraph=True) of training and inference with every quantizer: eager's numbers, and no graph too many.

The backend splits forward and backward as inductor does, and computes again in the backward what is cheap: what a
forward reads of its state before it writes there must not be read again afterwards. It runs eager's own kernels, so
that all numbers must be equal to the last bit.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import run_fw_bw_and_get_code

from quantkern import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
)

pytestmark = pytest.mark.usefixtures("scales_the_long_way")

BOTH = ["weight", "input", "output"]
LAYERS = ["Conv2d", "Linear"]
DELAY = 2
Attach = Callable[[nn.Module, torch.optim.Optimizer | None], Any]


class Net(nn.Module):
    """A branch, a batch norm, an activation: what the networks of users are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.Hardtanh()
        self.deep = nn.Conv2d(4, 4, 3, padding=1)
        self.deep_bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return self.fc((x + self.act(self.deep_bn(self.deep(x)))).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(seed: int) -> Tensor:
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def rules(types: list[str], bits: int = 8, **more: Any) -> list[dict[str, Any]]:
    return [{"quant_types": types, "quant_bits": bits, "op_types": LAYERS, **more}]


def qat(fold: bool = False, freeze: int | None = None, **more: Any) -> Attach:
    return lambda model, optimizer: QAT_Quantizer(
        model, rules(BOTH, **more), optimizer, fold_bn=fold, freeze_bn_step=freeze
    )


def lsq(fold: bool = False, freeze: int | None = None, **more: Any) -> Attach:
    return lambda model, optimizer: LsqQuantizer(
        model, rules(BOTH, 4, **more), optimizer, fold_bn=fold, freeze_bn_step=freeze
    )


def dorefa(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Any:
    return DoReFaQuantizer(model, rules([*BOTH, "gradient"], 6, seed=3), optimizer)


def bnn(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Any:
    config = [{"quant_types": ["output"], "quant_bits": 1, "op_names": ["act"]},
              {"quant_types": ["weight"], "quant_bits": 1, "op_names": ["deep", "fc"]}]  # fmt: skip
    return BNNQuantizer(model, config, optimizer)


def naive(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Any:
    return NaiveQuantizer(model, rules(["weight"]), optimizer)


CHANNELS = {"quant_scheme": {"weight": "per_channel_symmetric", "input": "per_channel_affine",
                             "output": "per_channel_affine"}}  # fmt: skip
TRAINED: dict[str, Attach] = {
    "qat": qat(),
    "qat-delayed": qat(quant_start_step=DELAY),
    "qat-channels": qat(**CHANNELS),
    "qat-channels-delayed": qat(**CHANNELS, quant_start_step=DELAY),
    "qat-folded": qat(True),
    "qat-folded-channels": qat(True, **CHANNELS),
    "qat-folded-delayed": qat(True, quant_start_step=DELAY),
    "lsq": lsq(),
    "lsq-channels": lsq(quant_scheme="per_channel_symmetric"),
    "lsq-offset": lsq(quant_scheme={"input": "per_tensor_affine", "output": "per_channel_affine"}),
    "lsq-folded": lsq(True),
    "dorefa": dorefa,
    "bnn": bnn,
    "naive": naive,
}


class Counting:
    """A backend that says how often something was compiled."""

    def __init__(self) -> None:
        self.graphs = 0
        self.compile = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return self.compile(module, inputs)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Pair:
    """The same quantized model twice: one runs as it is, the other compiled."""

    def __init__(self, attach: Attach, with_optimizer: bool = True, eager_steps: int = 0) -> None:
        self.backend = Counting()
        self.models, self.optimizers, self.quantizers = [], [], []
        for _ in range(2):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            self.quantizers.append(attach(model, optimizer if with_optimizer else None))
            self.models.append(model)
            self.optimizers.append(optimizer)
        self.calls: list[Callable[[Tensor], Tensor]] = list(self.models)
        for seed in range(eager_steps):
            self.step(100 + seed)
        self.calls[1] = torch.compile(self.models[1], fullgraph=True, backend=self.backend)

    def step(self, seed: int, rtol: float = 0.0, atol: float = 0.0, autocast: torch.dtype | None = None) -> None:
        """One training step of both, which must agree."""
        losses = []
        for call, optimizer in zip(self.calls, self.optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                output = call(batch(seed))
            losses.append(output.float().square().mean())
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=rtol, atol=atol)
        for (name, mine), other in zip(self.models[0].named_parameters(), self.models[1].parameters(), strict=True):
            torch.testing.assert_close(other.grad, mine.grad, rtol=rtol, atol=atol, msg=lambda t, n=name: f"{n}: {t}")
        for optimizer in self.optimizers:
            optimizer.step()
        self.compare(rtol, atol)

    def compare(self, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Parameters and state."""
        mine, other = (model.state_dict() for model in self.models)
        for name, value in mine.items():
            torch.testing.assert_close(other[name], value, rtol=rtol, atol=atol, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("name", TRAINED)
def test_training_and_inference_equal_eager(name: str) -> None:
    pair = Pair(TRAINED[name], eager_steps=int(name.startswith("lsq")))
    for seed in range(4):
        pair.step(seed)
    assert pair.backend.graphs == 1
    for model in pair.models:
        model.eval()
    with torch.no_grad():
        for seed in (8, 9):
            torch.testing.assert_close(pair.calls[1](batch(seed)), pair.calls[0](batch(seed)), rtol=0, atol=0)
    assert pair.backend.graphs == 2
    pair.compare()


@pytest.mark.parametrize("name", ["qat", "lsq", "dorefa", "bnn"])
def test_autocast_equals_eager(name: str) -> None:
    pair = Pair(TRAINED[name], eager_steps=int(name == "lsq"))
    for seed in range(2):
        pair.step(seed, autocast=torch.bfloat16)
    assert pair.backend.graphs == 1


@pytest.mark.parametrize("name", ["qat-channels-delayed", "qat-folded-delayed"])
def test_forwards_that_count_their_own_steps(name: str) -> None:
    """Without an optimizer the step counter is part of the graph."""
    pair = Pair(TRAINED[name], with_optimizer=False)
    for seed in range(DELAY + 2):
        pair.step(seed)
    assert pair.backend.graphs == 1
    assert all(model.conv.parametrizations.weight[0].step == DELAY + 2 for model in pair.models)


def test_observing_stops_in_the_same_graph() -> None:
    pair = Pair(TRAINED["qat-channels"])
    pair.step(0)
    for quantizer in pair.quantizers:
        quantizer.freeze_ranges()
    before = pair.models[1].fc.quantkern.input.running_max.clone()
    pair.step(1)
    assert torch.equal(pair.models[1].fc.quantkern.input.running_max, before)
    for quantizer in pair.quantizers:
        quantizer.freeze_ranges(False)
    pair.step(2)
    assert not torch.equal(pair.models[1].fc.quantkern.input.running_max, before)
    assert pair.backend.graphs == 1


@pytest.mark.parametrize("attach", [qat(True, freeze=DELAY), lsq(True, freeze=DELAY + 1)], ids=["qat", "lsq"])
def test_batch_norms_freeze_in_a_second_graph(attach: Attach) -> None:
    """Another form of the layer: the one change that a rule makes to the program."""
    pair = Pair(attach, eager_steps=1)
    for seed in range(4):
        pair.step(seed)
    assert pair.backend.graphs == 2
    assert pair.models[1].bn.num_batches_tracked == pair.models[0].bn.num_batches_tracked < 5


def test_a_delayed_learned_scale_is_compiled_for_both_phases() -> None:
    """The graph of the float steps asks nothing of the device; where the scales start, one eager step is needed."""
    pair = Pair(lsq(quant_start_step=DELAY))
    for seed in range(DELAY):
        pair.step(seed)
    assert pair.backend.graphs == 1
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run one training step before compiling"):
        pair.calls[1](batch(DELAY))
    fast, pair.calls[1] = pair.calls[1], pair.models[1]
    pair.step(DELAY)
    pair.calls[1] = fast
    for seed in range(DELAY + 1, DELAY + 4):
        pair.step(seed)
    assert pair.backend.graphs == 2


def test_a_compiled_forward_cannot_count_for_a_learned_scale() -> None:
    """Counted on the device alone, the delay would end when somebody asks: an error says so, a graph break helps."""
    model = net()
    LsqQuantizer(model, rules(BOTH, quant_start_step=DELAY))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give the quantizer the optimizer"):
        torch.compile(model, fullgraph=True, backend="eager")(batch(0))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager")
    for seed in range(DELAY):
        assert not model.fc.quantkern.input.is_observed()
        fast(batch(seed))
    fast(batch(DELAY))
    assert model.fc.quantkern.input.is_observed()


def test_a_cuda_graph_refuses_a_scale_that_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a capture asks; the counters of the host stand still in it, since nothing runs."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LsqQuantizer(model, rules(BOTH, quant_start_step=1), optimizer)
    model(batch(0)).sum().backward()
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr("quantkern.learned.lsq.is_recorded", lambda x: True)
        with pytest.raises(RuntimeError, match=r"conv\.\w+: a scale starts .*outside of a CUDA graph"):
            model(batch(1))
    model(batch(1)).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr("quantkern.learned.lsq.is_recorded", lambda x: True)
        patch.setattr("quantkern.fake_quant.is_recorded", lambda x: True)
        patch.setattr("quantkern.learned.state.is_recorded", lambda x: True)
        model(batch(2)).sum().backward()
        optimizer.step()
    assert model.fc.quantkern.input.steps_done == 1


def test_graph_breaks_start_a_learned_scale() -> None:
    """Without fullgraph nothing is asked of the user."""
    models = [net(), net()]
    for model in models:
        LsqQuantizer(model, rules(BOTH, 4))
    counters = torch._dynamo.utils.counters
    counters.clear()
    fast = torch.compile(models[1], backend="eager")
    for seed in range(2):
        assert torch.equal(fast(batch(seed)), models[0](batch(seed)))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert not [text for text in counters["graph_break"] if "disable()" not in text]  # nothing is compiled in pieces


@pytest.mark.parametrize("fold", [False, True])
def test_a_compressed_model_keeps_one_graph(fold: bool) -> None:
    model = net().eval()
    model(batch(0))
    quantizer = ObserverQuantizer(model, rules(BOTH, observer="mse", **CHANNELS), fold_bn=fold)
    quantizer.calibrate([batch(0), batch(1)], progress=False)
    quantizer.compress()
    backend = Counting()
    fast = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(fast(batch(seed)), model(batch(seed)))
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["qat-folded-channels", "dorefa"])
def test_copies_compile_by_themselves(name: str) -> None:
    """A compiled graph holds no state of the model that it was made of."""
    model = net()
    TRAINED[name](model, None)
    torch.compile(model, fullgraph=True, backend=Counting())(batch(0)).sum().backward()
    twin = copy.deepcopy(model)
    kept = copy.deepcopy(model.state_dict())
    torch.compile(twin, fullgraph=True, backend=Counting())(batch(1)).sum().backward()
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert not all(torch.equal(value, kept[key]) for key, value in twin.state_dict().items())


class One(nn.Module):
    """One layer: what inductor makes of batch norms and losses is not asked here."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


KERNELS = {
    "qat-channels-delayed": ["fake_quantize_weight_forward", "fake_quantize_activation_forward"],
    "lsq": ["lsq_forward", "lsq_backward"],
    "dorefa": ["dorefa_weight_forward", "dorefa_activation_forward", "dorefa_weight_backward", "dorefa_gradient"],
}


@pytest.mark.parametrize("name", KERNELS)
def test_inductor_calls_our_kernels(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The whole compiler: eager's numbers to rounding, nothing said about graphs or fallbacks."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        eager = One()
        TRAINED[name](eager, None)
        eager(torch.randn(8, 64)).sum().backward()
        eager.zero_grad()
        compiled = copy.deepcopy(eager)
        warned.clear()
        fast = torch.compile(compiled, fullgraph=True)
        said: list[str] = []
        for seed in range(DELAY + 1):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
            losses = [eager(x).square().mean()]
            loss, code = run_fw_bw_and_get_code(lambda x=x: fast(x).square().mean())
            losses[0].backward()
            said += code
            torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            eager.eval(), compiled.eval()
            torch.testing.assert_close(fast(x), eager(x), rtol=1e-5, atol=1e-6)
    for (label, mine), other in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, mine.grad, rtol=1e-4, atol=1e-6, msg=lambda t, n=label: f"{n}: {t}")
    state = compiled.state_dict()
    for label, value in eager.state_dict().items():
        torch.testing.assert_close(state[label], value, rtol=1e-6, atol=1e-7, msg=lambda t, n=label: f"{n}: {t}")
    for kernel in KERNELS[name]:
        assert any(f"torch.ops.quantkern.{kernel}" in code for code in said), kernel
    # Builds of torch for CUDA say that they find none.
    heard = [record for record in caplog.records if record.name != "torch.utils.cpp_extension"]
    assert not [record.getMessage() for record in heard if record.levelno >= logging.WARNING]
    others = re.compile("torch.jit|Consider upgrading to Python")
    own = [str(warning.message) for warning in warned if not others.search(str(warning.message))]
    assert not own, own
