"""All weights of a model in one operation: the same numbers as one by one, and what happens where that cannot be."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quantkern import LsqQuantizer, NaiveQuantizer, QAT_Quantizer
from quantkern.ahead import Ahead
from quantkern.all_weights import AllWeights
from quantkern.quantizers.base import Quantizer

Make = Callable[..., Quantizer]
Forward = Callable[[nn.Module, Tensor], Tensor]


class Calls(TorchDispatchMode):
    """Counts the forward kernels of weights: of all at once, and of single ones."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "quantkern":
            self.count[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def together(self) -> int:
        return self.count["fake_quantize_weights_forward"] + self.count["lsq_weights_forward"]

    @property
    def single(self) -> int:
        return self.count["fake_quantize_weight_forward"] + self.count["lsq_forward"]


class Net(nn.Module):
    """Layers of several kinds and granularities, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Linear(4, 5)

    def middle(self, x: Tensor) -> Tensor:
        return self.twice(torch.relu(self.depthwise(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.relu(self.norm(self.first(x))))
        x = torch.relu(self.up(torch.relu(self.twice(x))))
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


LAYERS = 5


def qat(model: nn.Module, optimizer: Any = None, scheme: str = "per_tensor_symmetric", **rule: Any) -> Quantizer:
    rules = [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"], "quant_scheme": scheme, **rule}]
    return QAT_Quantizer(model, rules, optimizer)


def lsq(model: nn.Module, optimizer: Any = None, **rule: Any) -> Quantizer:
    return LsqQuantizer(
        model, [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["default"], **rule}], optimizer
    )


MAKES = {
    "qat": qat,
    "qat_affine": lambda m, o=None: qat(m, o, "per_tensor_affine"),
    "qat_channels": lambda m, o=None: qat(m, o, "per_channel_affine"),
    "qat_delayed": lambda m, o=None: qat(m, o, quant_start_step=2),
    "naive": lambda m, o=None: NaiveQuantizer(m, None, o),
    "lsq": lsq,
    "lsq_channels": lambda m, o=None: lsq(m, o, quant_scheme="per_channel_symmetric"),
    "lsq_delayed": lambda m, o=None: lsq(m, o, quant_start_step=2),
}


def build(make: Make, model: type[nn.Module] = Net) -> tuple[nn.Module, Quantizer, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return net, make(net, optimizer), optimizer


def batch(seed: int) -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(
    make: Make, steps: int = 5, forward: Forward = lambda model, x: model(x), model: type[nn.Module] = Net
) -> tuple[list[Tensor], Calls]:
    """Losses, gradients of the last step and final state, and the calls of the last step."""
    net, _, optimizer = build(make, model)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        with Calls() as calls:
            loss = forward(net, batch(step)).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [*losses, *gradients, *net.state_dict().values()], calls


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it, and models that are quantized from then on take their weights one by one."""
    yield lambda: monkeypatch.setattr(AllWeights, "attach", lambda self, model: [])


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_training_gives_the_same_bits(make: Make, one_by_one: Callable[[], None]) -> None:
    together, calls = train(make)
    assert (calls.together, calls.single) == (1, 1)  # one of them is used twice
    one_by_one()
    expected, calls = train(make)
    assert (calls.together, calls.single) == (0, LAYERS + 1)
    same(together, expected)


@pytest.mark.parametrize("make", [qat, lsq])
def test_gradients_are_ready_layer_by_layer(make: Make, one_by_one: Callable[[], None]) -> None:
    """Each weight has a backward of its own, so that what is reduced over ranks overlaps with the rest."""
    orders = []
    for _ in range(2):
        model, _, _ = build(make)
        model(batch(0))
        order: list[str] = []
        for name, param in model.named_parameters():
            param.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))  # type: ignore[misc]
        model(batch(0)).square().mean().backward()
        orders.append(order)
        one_by_one()
    assert orders[0] == orders[1]
    weights = [name.split(".")[0] for name in orders[0] if name.endswith("original")]
    assert weights == ["last", "up", "depthwise", "first"] or weights == ["last", "up", "twice", "depthwise", "first"]


def outside(model: nn.Module, x: Tensor) -> Tensor:
    """A model's parts called on their own."""
    return model.last(model.up(model.middle(model.first(x))).mean((2, 3)))  # type: ignore[operator, union-attr]


def test_parts_called_on_their_own_take_their_weights_alone(one_by_one: Callable[[], None]) -> None:
    results, calls = train(qat, forward=outside)
    assert (calls.together, calls.single) == (0, LAYERS)
    one_by_one()
    same(results, train(qat, forward=outside)[0])


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(torch.relu(self.up(x)).mean((2, 3)))  # type: ignore[no-any-return]


class CheckpointedReentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("model", [Checkpointed, CheckpointedReentrant])
@pytest.mark.parametrize("make", [qat, lambda m, o: qat(m, o, "per_channel_affine"), lsq])
def test_checkpointed_segments(make: Make, model: type[nn.Module], one_by_one: Callable[[], None]) -> None:
    results, calls = train(make, model=model)
    assert (calls.together, calls.single) == (1, 2)  # two of them again in the backward
    one_by_one()
    same(results, train(make, model=model)[0])


class Tied(Net):
    """Two layers with the same Parameter, and one weight that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 8, 1)
        self.other.weight = self.twice.weight
        self.depthwise.weight.requires_grad_(False)

    def middle(self, x: Tensor) -> Tensor:
        return super().middle(self.other(x))


class Changing(Net):
    """Weights change while the forward runs."""

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.depthwise.parametrizations["weight"].original.mul_(1.5)  # type: ignore[index, union-attr]
        return super().middle(x)


class WithoutGradient(Net):
    """A part that is not trained, and one that is while the rest is not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.relu(self.norm(self.first(x)))
            with torch.enable_grad():
                x = self.middle(x)
        return self.last(torch.relu(self.up(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Tied, Changing, WithoutGradient])
@pytest.mark.parametrize("make", [qat, lambda m, o: qat(m, o, "per_channel_affine"), lsq])
def test_unusual_models_give_the_same_bits(make: Make, model: type[nn.Module], one_by_one: Callable[[], None]) -> None:
    together, calls = train(make, model=model)
    assert calls.together == 1
    one_by_one()
    same(together, train(make, model=model)[0])


def test_a_weight_that_changed_is_taken_alone() -> None:
    _, calls = train(qat, model=Changing)
    assert (calls.together, calls.single) == (1, 2)


def test_a_new_parameter_is_noticed(one_by_one: Callable[[], None]) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        weight = model.last.parametrizations["weight"]  # type: ignore[index, union-attr]
        weight.original = nn.Parameter(weight.original.detach() * 1.1)  # type: ignore[union-attr]
        return model(x)  # type: ignore[no-any-return]

    together = train(qat, forward=forward)[0]
    one_by_one()
    same(together, train(qat, forward=forward)[0])


def test_other_parameters_for_one_call() -> None:
    model, _, _ = build(qat)
    model(batch(0))
    others = {name: (p.detach() * 2).requires_grad_() for name, p in model.named_parameters()}
    with Calls() as calls:
        y = torch.func.functional_call(model, others, (batch(0),))
    assert calls.single == LAYERS + 1
    y.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in others.values())


def test_replicas_of_data_parallel_compute_their_own() -> None:
    model, _, _ = build(qat)
    model(batch(0))
    replica: nn.Module = model._replicate_for_data_parallel()  # type: ignore[operator]
    for name in replica._parameters:
        setattr(replica, name, model._parameters[name])
    with Calls() as calls:
        replica(batch(0))
    assert (calls.together, calls.single) == (0, LAYERS + 1)


def places(model: nn.Module) -> list[Ahead]:
    return [module.ahead for module in model.modules() if hasattr(module, "ahead")]


def test_nothing_stays_behind() -> None:
    """Results go with the forward, also where it fails; state_dict, copies and pickles never have them."""
    model, _, _ = build(qat)
    keys = list(model.state_dict())
    model(batch(0))
    kept: list[Any] = []

    def look(*_: Any) -> None:
        results = [place.result for place in places(model) if place.result is not None]
        assert len(results) == LAYERS - 1  # the first layer has taken its own
        kept.extend(weakref.ref(result) for result in results)
        copied = copy.deepcopy(model)
        assert all(place.result is None and place.seen is None for place in places(copied))
        assert pickle.loads(pickle.dumps(places(model)[0])).result is None
        assert list(model.state_dict()) == keys
        raise KeyError("in the middle")

    handle = model.get_submodule("norm").register_forward_hook(look)
    with pytest.raises(KeyError, match="in the middle"):
        model(batch(0))
    handle.remove()
    assert len(kept) == LAYERS - 1 and all(reference() is None for reference in kept)
    assert all(place.result is None for place in places(model))
    model(batch(0))


def test_a_copy_works_alone() -> None:
    model, _, _ = build(qat)
    model(batch(0))
    copied = copy.deepcopy(model)
    for param in copied.parameters():
        param.data.mul_(0.5)
    copied(batch(1))
    with Calls() as calls:
        y = copied(batch(1))
    assert (calls.together, calls.single) == (1, 1)
    assert not torch.equal(y, model(batch(1)))


def test_evaluation_takes_weights_one_by_one() -> None:
    model, _, _ = build(qat)
    model(batch(0))
    with Calls() as calls, torch.no_grad():
        model(batch(0))
        model.eval()
        model(batch(0))
    assert (calls.together, calls.single) == (0, 2 * (LAYERS + 1))


@pytest.mark.parametrize("make", [qat, lsq])
def test_compiled_training_is_one_graph(make: Make) -> None:
    torch._dynamo.reset()
    model, _, _ = build(make)
    model(batch(0)).sum().backward()
    model(batch(0)).sum().backward()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            torch.testing.assert_close(compiled(batch(seed)), other(batch(seed)))


def test_export_takes_the_hooks_off(tmp_path: Path) -> None:
    model, quantizer, _ = build(qat)
    model(batch(0))
    quantizer.export_model(tmp_path / "model.pt")
    assert not model._forward_pre_hooks and not model._forward_hooks and not model._forward_hooks_always_called


def test_a_folded_copy_has_no_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    rules = [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d", "Linear"]}]
    quantizer = QAT_Quantizer(model, rules, dummy_input=batch(0))
    folded = quantizer.folded_model()
    assert model._forward_pre_hooks and model._forward_hooks_always_called
    assert not any((folded._forward_pre_hooks, folded._forward_hooks, folded._forward_hooks_always_called))
