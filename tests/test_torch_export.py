"""torch.export of quantized models: own operations or ATen's, any batch size, saved and loaded; torch.compile."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkern.functional as F
from quantkern import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqQuantizer,
    NaiveQuantizer,
    ObserverQuantizer,
    QAT_Quantizer,
)
from quantkern.export import decompositions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(7, 2, 8, 8, generator=torch.Generator().manual_seed(2))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardtanh(), nn.Conv2d(8, 4, 3, padding=1)),
        *(nn.BatchNorm2d(4), nn.Hardtanh(), nn.Flatten(), nn.Linear(144, 5)),
    )


def rules(bits: int = 8, **more: Any) -> list[dict[str, Any]]:
    types = more.pop("types", ["weight", "input", "output"])
    return [{"quant_types": types, "quant_bits": bits, "op_types": ["Conv2d", "Linear"], **more}]


def after_a_step(kind: Any, settings: list[dict[str, Any]] | None, **more: Any) -> Any:
    model = net()
    quantizer = kind(model, settings, torch.optim.SGD(model.parameters(), lr=0.01), **more)
    model(X)
    return quantizer


def observer() -> ObserverQuantizer:
    quantizer = ObserverQuantizer(net().eval(), rules())
    quantizer.calibrate([X], progress=False)
    quantizer.compress()
    return quantizer


def loaded() -> QAT_Quantizer:
    """A loaded grid, which is not that of the weight's range."""
    first, second = after_a_step(QAT_Quantizer, rules(6)), QAT_Quantizer(net(), rules(6))
    second.bound_model[0].parametrizations.weight.original.data *= 0.7
    calibration = {name: first._attachments[i].calibration() for i, name in enumerate(("0", "3", "7"))}
    second.load_calibration_config(calibration)
    return second


BINARY = [
    {"quant_types": ["weight"], "quant_bits": 1, "op_names": ["3", "7"]},
    {"quant_types": ["output"], "quant_bits": 1, "op_names": ["2", "5"]},
]
PER_CHANNEL = "per_channel_symmetric"
QUANTIZERS: dict[str, Callable[[], Any]] = {
    "naive": lambda: after_a_step(NaiveQuantizer, None),
    "qat": lambda: after_a_step(QAT_Quantizer, rules()),
    "qat-per-channel-folded": lambda: after_a_step(
        QAT_Quantizer, rules(quant_scheme=PER_CHANNEL, quant_dtype="int"), dummy_input=X
    ),
    "qat-delayed": lambda: after_a_step(QAT_Quantizer, rules(quant_start_step=10)),
    "qat-loaded": loaded,
    "lsq": lambda: after_a_step(LsqQuantizer, rules(4)),
    "lsq-offset-folded": lambda: after_a_step(LsqQuantizer, rules(4, offset=True), dummy_input=X),
    "lsq-delayed": lambda: after_a_step(LsqQuantizer, rules(4, quant_start_step=10)),
    "dorefa": lambda: after_a_step(DoReFaQuantizer, rules(3, types=["weight", "input", "gradient"])),
    "bnn": lambda: after_a_step(BNNQuantizer, BINARY),
    "observer": observer,
}


def own_operations(program: torch.export.ExportedProgram) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {target for target in targets if "quantkern" in target or "auto_functionalized" in target}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_exported_programs(name: str) -> None:
    model = QUANTIZERS[name]().bound_model.eval()
    with torch.no_grad():
        expected = model(OTHER)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(model, (X,), dynamic_shapes=(batch,))
        assert bool(own_operations(program)) is (name != "lsq-delayed")
        assert torch.equal(program.module()(OTHER), expected)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(OTHER), expected)
    plain = program.run_decompositions(decompositions())
    assert not own_operations(plain) and not plain.graph_signature.buffers_to_mutate
    with torch.no_grad():
        found = plain.module()(OTHER)
    if "dorefa" in name:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_compiled_inference(name: str) -> None:
    torch._dynamo.reset()
    model = QUANTIZERS[name]().bound_model.eval()
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(X), expected)


def test_functions_decompose() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            scale = torch.full((3,), 0.2)
            return (
                F.fake_quantize(x, 0.1, 3, 0, 15),
                F.fake_quantize(weight, scale, torch.tensor([1, 2, 3], dtype=torch.int32), -8, 7, axis=-2),
                F.lsq(weight, scale, -4, 3, axis=0),
                F.dorefa_activation(x, 3),
                F.sign_linear(x, weight),
                F.binary_linear(x, F.pack_signs(weight), 4),
            )

    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    program = torch.export.export(Own(), (x, weight))
    plain = program.run_decompositions(decompositions())
    assert own_operations(program) and not own_operations(plain)
    for found, expected in zip(plain.module()(x, weight), Own()(x, weight), strict=True):
        assert torch.equal(found, expected)


def test_a_program_of_a_training_model_still_writes_its_state() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    QAT_Quantizer(model, [{"quant_types": ["weight"], "quant_bits": 8, "op_types": ["Linear"]}])
    program = torch.export.export(model.train(), (torch.randn(3, 4),))
    assert "quantkern.fake_quantize_weight.default" in own_operations(program)
