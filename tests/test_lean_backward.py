"""What a step keeps for its backward: fewer bytes, the same numbers, and torch's own behaviour wherever it matters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import quantized_networks
from benchmarks.networks import NETWORKS
from benchmarks.step_memory import measure
from quantkern import LsqQuantizer, QAT_Quantizer, attach, lean_backward, reference
from quantkern.lean_backward import LeanActivations

CPU = torch.device("cpu")
OPS = torch.ops.quantkern


@pytest.mark.parametrize(("name", "most"), [("lenet", 1.08), ("resnet18", 1.0), ("transformer", 1.08)])
def test_a_step_takes_no_more_memory_than_in_float(name: str, most: float) -> None:
    network = NETWORKS[name]
    batches = [network.draw(CPU)]
    _, plain = measure(lambda: quantized_networks.in_float(network, CPU), batches, CPU)
    _, ours = measure(lambda: quantized_networks.ours(False)(network, CPU), batches, CPU)
    assert ours["peak_bytes"] <= most * plain["peak_bytes"]
    assert ours["saved_bytes"] <= 0.9 * plain["saved_bytes"]


class Block(nn.Module):
    """Convolutions of one, two and three dimensions, linear layers on two and three, every clipping activation."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2, bias=False)
        self.relu6 = nn.ReLU6(inplace)
        self.conv1 = nn.Conv1d(16, 32, 3)
        self.tanh = nn.Hardtanh(-0.5, 0.75, inplace)
        self.conv3 = nn.Conv3d(1, 4, 3)
        self.wide = nn.Linear(128, 96)
        self.out = nn.Linear(96, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv2(x)))
        x = self.relu6(self.up(x)).flatten(2)
        x = self.tanh(self.conv1(x))
        x = self.conv3(x.unflatten(2, (-1, 2)).unsqueeze(1).repeat(1, 1, 1, 1, 2))
        x = self.relu(self.wide(x.flatten(2)[:, :, :1536].reshape(x.shape[0], -1, 128)))
        return self.out(x.mean(1))


TYPES = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"]


def rules(scheme: str) -> list[dict[str, Any]]:
    own = {} if scheme == "learned" else {"quant_scheme": {"weight": scheme, "input": "per_tensor_affine"}}
    outputs = {} if scheme == "learned" else {"quant_scheme": "per_tensor_affine", "quant_dtype": "uint"}
    return [
        {"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": TYPES, **own},
        {"quant_types": ["output"], "quant_bits": 8, "op_types": ["ReLU", "ReLU6", "Hardtanh"], **outputs},
    ]


def train(scheme: str, *, inplace: bool, form: torch.memory_format, fold: bool = False) -> list[Tensor]:
    """Losses, gradients and state of three steps."""
    torch.manual_seed(0)
    model = Block(inplace)
    model.conv2.to(memory_format=form)  # type: ignore[call-overload]
    model.up.to(memory_format=form)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    if scheme == "learned":
        LsqQuantizer(model, rules(scheme), optimizer)
    else:
        QAT_Quantizer(model, rules(scheme), optimizer, fold_bn=fold)
    seen = []
    for seed in range(3):
        x = torch.randn(6, 4, 12, 12, generator=torch.Generator().manual_seed(seed)).to(memory_format=form)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        seen += [
            loss.detach(),
            *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None),
        ]
        optimizer.step()
    return [*seen, *(value.clone() for value in model.state_dict().values())]


@contextmanager
def everything_kept() -> Iterator[None]:
    """Without what this file tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeanActivations, "attach", lambda self: None)
        patch.setattr(attach, "keep_codes", lambda *_: None)
        yield


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_symmetric", "per_tensor_affine", "learned"])
def test_training_gives_the_same_bits(scheme: str, inplace: bool, form: torch.memory_format) -> None:
    lean = train(scheme, inplace=inplace, form=form)
    with everything_kept():
        whole = train(scheme, inplace=inplace, form=form)
    assert len(lean) == len(whole)
    for ours, expected in zip(lean, whole, strict=True):
        assert torch.equal(ours, expected)


def test_training_with_a_folded_batch_norm_gives_the_same_bits() -> None:
    lean = train("per_channel_symmetric", inplace=False, form=torch.contiguous_format, fold=True)
    with everything_kept():
        whole = train("per_channel_symmetric", inplace=False, form=torch.contiguous_format, fold=True)
    assert all(torch.equal(ours, expected) for ours, expected in zip(lean, whole, strict=True))


def net(relu: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 32, 3), relu or nn.ReLU(), nn.Conv2d(32, 32, 3))


def quantized(relu: nn.Module | None = None) -> nn.Sequential:
    model = net(relu)
    QAT_Quantizer(model, rules("per_tensor_symmetric")).compress()
    return model


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what is kept as codes."""
    seen: list[torch.Size] = []

    class Recorded:
        from_codes = OPS.from_codes

        class to_codes:  # noqa: N801
            @staticmethod
            def default(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
                codes, parameters = OPS.to_codes.default(x, *rest)
                if codes.numel():
                    seen.append(x.shape)
                return codes, parameters

    monkeypatch.setattr(lean_backward, "_OPS", Recorded)
    return seen


def test_inputs_and_weights_are_kept_as_codes(encoded: list[torch.Size]) -> None:
    quantized()(batch())
    assert encoded == [(4, 8, 16, 16), (4, 32, 14, 14), (32, 32, 3, 3)]


def test_nothing_is_encoded_where_no_backward_follows(encoded: list[torch.Size]) -> None:
    model = quantized()
    with torch.no_grad():
        model(batch())
    model.requires_grad_(False)(batch())
    assert not encoded


def test_forwards_that_renew_the_range_leave_earlier_ones_valid() -> None:
    """The scale in the buffer is another one by the time of the first backward."""
    gradients = []
    for together in (False, True):
        model = quantized()
        if together:
            (model(batch(0)).square().sum() + model(batch(1) * 5).square().sum()).backward()
        else:
            for x in (batch(0), batch(1) * 5):
                model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)


def test_second_derivatives(encoded: list[torch.Size]) -> None:
    def penalty() -> list[Tensor]:
        model, x = quantized(), batch().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    ours = penalty()
    assert encoded
    with everything_kept():
        expected = penalty()
    assert len(ours) == len(expected) >= 3
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def recomputed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]


def on_the_cpu(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [recomputed, on_the_cpu])
def test_who_packs_saved_tensors_already_goes_on_doing_it(
    call: Callable[[nn.Module, Tensor], Tensor], encoded: list[torch.Size]
) -> None:
    gradients = []
    for run in (call, lambda model, x: model(x)):
        model = quantized().train()
        for module in model.modules():  # ranges stand still, so that a forward may be repeated
            if hasattr(module, "observing"):
                model(batch()) if not module.is_observed() else None
                module.observing.fill_(False)
        before = len(encoded)
        run(model, batch()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert (len(encoded) == before) is (run is call)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_values_off_the_grid_are_kept_as_they_are(encoded: list[torch.Size]) -> None:
    x = batch()
    x[0, 0, 0, 0] = torch.nan
    model = quantized()
    model(x).sum().backward()
    assert (4, 8, 16, 16) not in encoded
    assert model[0].parametrizations.weight.original.grad.isnan().any()


def test_a_hook_of_the_user_sees_what_it_always_saw() -> None:
    seen: list[Tensor] = []
    model = net()
    model[1].register_forward_hook(lambda layer, args, output: seen.append(output))
    QAT_Quantizer(model, rules("per_tensor_symmetric")).compress()
    model[1].register_forward_hook(lambda layer, args, output: seen.append(output))
    model(batch())
    relu, quantized_relu = seen
    assert relu.min() == 0 and relu.unique().numel() > 256 >= quantized_relu.unique().numel()


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2.0, 0.5), nn.ReLU(True), nn.Hardtanh(-1, 1, True)]
)
def test_activations_equal_torchs(layer: nn.Module) -> None:
    lean = copy.deepcopy(layer)
    LeanActivations(nn.Sequential(lean)).attach()
    assert type(lean) is not type(layer) and type(lean).__name__ == type(layer).__name__
    assert isinstance(lean, type(layer)) and repr(lean) == repr(layer)
    for shape in ((7,), (3, 5, 9, 4), (0, 3)):
        start = (torch.randn(shape) * 4).requires_grad_()
        results = []
        for one in (layer, lean):
            start.grad = None
            x = start * 2
            version = x._version
            y = one(x)
            (y * torch.arange(1.0, y.numel() + 1).view(shape)).sum().backward()
            results.append((y.detach(), start.grad, x._version - version, y is x))
        assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
        assert results[0][2:] == results[1][2:]
    for x in (torch.randn(9), torch.randn(4, 6).t()):
        assert torch.equal(layer(x.clone()), lean(x.clone()))


def test_in_place_on_a_leaf_and_on_a_saved_tensor_is_torchs_error() -> None:
    layer = nn.ReLU(True)
    LeanActivations(nn.Sequential(layer)).attach()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        layer(torch.ones(3, requires_grad=True))
    x = torch.ones(3, requires_grad=True)
    y = x.exp()  # saves its result
    layer(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_a_view() -> None:
    layer = nn.ReLU(True)
    LeanActivations(nn.Sequential(layer)).attach()
    x = torch.randn(4, 6, requires_grad=True)
    y = x * 1
    layer(y[1:3])
    y.sum().backward()
    expected = torch.ones(4, 6)
    expected[1:3] = (x[1:3] > 0).float()
    assert torch.equal(x.grad, expected) and torch.equal(y[1:3], x[1:3].relu()) and torch.equal(y[0], x[0])


def test_the_model_gets_its_own_classes_back(tmp_path: Any) -> None:
    class Special(nn.ReLU):
        pass

    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), Special(), nn.Hardtanh(), nn.Conv2d(32, 8, 3))
    quantizer = QAT_Quantizer(model, [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Conv2d"]}])
    assert [type(layer) for layer in model[1:4]] == [lean_backward.ReLU, Special, lean_backward.Hardtanh]
    copied = copy.deepcopy(model)
    assert torch.equal(copied(batch()), model(batch()))
    quantizer.export_model(tmp_path / "model.pth")
    assert [type(layer) for layer in model[1:4]] == [nn.ReLU, Special, nn.Hardtanh]
    assert not any(layer._forward_hooks for layer in model)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 40, 7), (5, 6, 64), (1, 130, 3)])
def test_codes_give_every_number_back(shape: tuple[int, ...], axis: int | None) -> None:
    channels = 1 if axis is None else shape[axis]
    scale, zero_point = torch.linspace(0.001, 0.3, channels), torch.arange(channels, dtype=torch.int32) % 200
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5
    for dense in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        y = torch.ops.quantkern.fake_quantize(dense, scale, zero_point, 0, 255, axis)
        codes, parameters = OPS.to_codes(y, scale, zero_point, 0, 255, axis)
        assert codes.dtype == torch.uint8 and codes.stride() == y.stride() and codes.shape == y.shape
        assert torch.equal(codes, reference.to_codes(y, scale, zero_point, 0, 255, axis))
        back = OPS.from_codes(codes, parameters, 0, axis)
        assert torch.equal(back, y) and torch.equal(back, reference.from_codes(codes, parameters, 0, axis))
        assert not OPS.to_codes(dense, scale, zero_point, 0, 255, axis)[0].numel()  # not on the grid


def test_codes_refuse_what_does_not_fit_a_byte() -> None:
    one, zero = torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="quant_max - quant_min must be at most 255, got 256"):
        OPS.to_codes(torch.ones(3), one, zero, -128, 128, None)
    with pytest.raises(TypeError, match="x must be"):
        OPS.to_codes(torch.ones(3, dtype=torch.float16), one, zero, 0, 255, None)
    with pytest.raises(ValueError, match="parameters must hold 3 values"):
        OPS.from_codes(torch.zeros(4, dtype=torch.uint8), torch.ones(2), 0, None)


def test_function_transforms() -> None:
    """torch.func has kernels for torch's own activations; a batch of one gives the gradients of autograd."""
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 2))
    QAT_Quantizer(model, [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]}])
    parameters, x = dict(model.named_parameters()), torch.randn(3, 96)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for row in range(3):
        expected = torch.autograd.grad(loss(parameters, x[row : row + 1]), list(parameters.values()))
        for ours, value in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(ours[row], value)
