"""NNI's documentation of its Naive, QAT, LSQ, DoReFa and BNN quantizers, with only the import lines changed.

The blocks stand in nni_documents.py.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from nni_documents import (
    BATCH_NORM_FOLDING,
    BNN,
    DEFAULTS,
    DOREFA,
    IMPORTS,
    LSQ,
    MULTI_GPU,
    NAIVE,
    OBSERVER,
    OBSERVER_EXAMPLE,
    QAT,
    RULES,
)
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from models import BinaryVGG  # noqa: E402

pytestmark = pytest.mark.usefixtures("factory_settings")


class Mnist(nn.Module):
    """The model of NNI's examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.bn1 = nn.BatchNorm2d(20)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.relu2 = nn.ReLU6()
        self.fc1 = nn.Linear(4 * 4 * 50, 64)
        self.relu3 = nn.ReLU6()
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.relu1(self.bn1(self.conv1(x))), 2, 2)
        x = nn.functional.max_pool2d(self.relu2(self.conv2(x)), 2, 2)
        return nn.functional.log_softmax(self.fc2(self.relu3(self.fc1(x.flatten(1)))), dim=1)


def run(block: str, **names: Any) -> dict[str, Any]:
    """Execute a block, import lines changed; its names."""
    for theirs, ours in IMPORTS.items():
        block = block.replace(theirs, ours)
    assert "nni" not in block
    import quantkern

    scope = {"torch": torch, "quantkern": quantkern, "Mnist": Mnist, **names}
    exec(compile(block, "NNI document", "exec"), scope)
    return scope


def train_a_step(model: nn.Module) -> None:
    """One step that must move every weight of the convolutions and linear layers."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = nn.functional.nll_loss(model(torch.randn(4, 1, 28, 28)), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    matrices = [(old, new) for old, new in zip(before, model.parameters(), strict=True) if new.dim() > 1]
    assert len(matrices) == 4
    assert all(not torch.equal(old, new) for old, new in matrices)


def test_naive() -> None:
    model = Mnist()
    scope = run(NAIVE, model=model)
    assert scope["model"] is model
    weight = model.conv1.weight
    scale = model.conv1.parametrizations.weight[0].scale
    assert (scale * 127).item() == pytest.approx(model.conv1.parametrizations.weight.original.abs().max().item())
    assert weight.unique().numel() <= 255
    train_a_step(model)


def test_qat() -> None:
    scope = run(QAT)
    model = scope["model"]
    assert scope["quantizer"].compress() is model
    train_a_step(model)
    assert model.fc1.weight.unique().numel() <= 256
    assert model.relu3.quantkern.output.step.item() == 1


def test_batch_norm_folding() -> None:
    config_list = run(QAT)["config_list"]
    from quantkern import QAT_Quantizer

    model = Mnist()
    scope = run(BATCH_NORM_FOLDING, model=model, config_list=config_list, QAT_Quantizer=QAT_Quantizer)
    assert scope["quantizer"].bound_model is model
    assert scope["quantizer"].folded_layers == {"conv1": "bn1"}
    train_a_step(model)


def test_defaults_of_dtype_and_scheme() -> None:
    run(DEFAULTS)
    model = run(QAT)["model"]
    train_a_step(model)
    assert model.conv2.parametrizations.weight[0].scale.shape == (50,)
    assert model.conv2.parametrizations.weight[0].spec.quant_range == (-127, 127)
    assert model.relu1.quantkern.output.spec.scheme == "per_tensor_symmetric"


def test_dtype_and_scheme_in_rules() -> None:
    from quantkern import QAT_Quantizer

    model = Mnist()
    quantizer = QAT_Quantizer(model, run(RULES)["config_list"])
    train_a_step(quantizer.compress())
    assert model.conv1.parametrizations.weight[0].scale.shape == (20,)
    assert model.relu1.quantkern.output.spec.quant_range == (0, 255)


def test_multi_gpu(tmp_path: Path) -> None:
    """DistributedDataParallel around the quantizer, as documented, without compress()."""
    config_list = run(QAT)["config_list"]
    inner = Mnist()

    def evaluate(model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            assert model(torch.randn(2, 1, 28, 28)).isfinite().all()

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        scope = run(
            MULTI_GPU,
            define_your_model=lambda: inner,
            other_params={"config_list": config_list},
            epochs=2,
            train=train_a_step,
            eval=evaluate,
        )
    finally:
        torch.distributed.destroy_process_group()
    assert scope["model"].module.bound_model is inner
    assert inner.relu1.quantkern.output.step.item() == 2
    assert inner.relu1.quantkern.output.observed


def test_lsq() -> None:
    """The document leaves out where the optimizer comes from; it must hold the parameters of this very model."""
    model = Mnist()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scope = run(LSQ, Mnist=lambda: model, optimizer=optimizer)
    assert scope["quantizer"].compress() is model
    scales = list(scope["quantizer"].scale_parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [10, 3]
    nn.functional.nll_loss(model(torch.randn(4, 1, 28, 28)), torch.tensor([1, 2, 3, 4])).backward()
    before = [scale.detach().clone() for scale in scales]
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, scales, strict=True))
    assert model.conv1.parametrizations.weight[0].spec.quant_range == (-128, 127)
    assert model.relu1.quantkern.output.spec.quant_range == (0, 255)
    train_a_step(model)


def test_dorefa() -> None:
    model = Mnist()
    scope = run(DOREFA, model=model)
    assert scope["quantizer"].compress() is model
    for layer in (model.conv1, model.conv2, model.fc1, model.fc2):
        steps = (layer.weight.detach() + 1) * 255 / 2
        assert layer.weight.abs().max() <= 1 and torch.allclose(steps, steps.round(), atol=1e-3)
    train_a_step(model)


def test_bnn() -> None:
    """The document's network, an eighth as wide; its rules name every layer by type and by name."""
    made = []

    def vgg(num_classes: int) -> nn.Module:
        made.append(BinaryVGG(3, num_classes, width=0.125))
        return made[0]

    scope = run(BNN, VGG_Cifar10=vgg)
    model, quantizer = scope["model"], scope["quantizer"]
    assert model is made[0]
    assert quantizer.packed_layers == tuple(scope["configure_list"][0]["op_names"][2:])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    optimizer.step()
    quantizer.step()
    matrices = [(old, new) for old, new in zip(before, model.parameters(), strict=True) if new.dim() > 1]
    assert len(matrices) == 9 and all(not torch.equal(old, new) for old, new in matrices)
    assert set(model.features[3].weight.unique().tolist()) == {-1.0, 1.0}


def _images() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 1, 28, 28, generator=generator), torch.zeros(8)) for _ in range(4)]


def test_observer() -> None:
    """As in NNI a model in training mode is refused; the document leaves out where it is put into evaluation mode."""
    with pytest.raises(ValueError, match="call model.eval"):
        run(OBSERVER, calib_loader=_images())
    torch.manual_seed(0)
    floating = Mnist().eval()
    model = copy.deepcopy(floating)
    scope = run(OBSERVER, Mnist=lambda: model, calib_loader=_images())
    assert scope["model"] is model and not model.training
    assert model.conv2.weight.unique().numel() <= 255
    assert model.conv2.parametrizations.weight[0].spec.quant_range == (-127, 127)
    assert model.relu1.quantkern.output.spec.quant_range == (0, 127)
    x = _images()[0][0]
    seen = []
    handle = model.relu2.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        assert 0 < (model(x) - floating(x)).abs().max() < 0.1
    handle.remove()
    assert seen[0].unique().numel() <= 128


def test_observer_example() -> None:
    model = Mnist().eval()
    scope = run(OBSERVER_EXAMPLE, model=model, calib_loader=_images())
    assert scope["quantizer"].is_compressed()
    assert model.conv1.weight.unique().numel() <= 255
