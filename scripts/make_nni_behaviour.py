"""Writes tests/data/nni_behaviour.json: what NNI's quantizers do in small situations that docs/migrating.md speaks of.

Run it in an environment with nni 2.10 and torch:  python scripts/make_nni_behaviour.py

Every function below builds a situation with the quantizers of the library that it is given and says what it saw. The
same functions run on quantkern in tests/test_nni_behaviour.py. Nothing depends on a random generator's version: the
facts are zeros, equalities, exceptions and shapes.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TABLE = Path(__file__).resolve().parent.parent / "tests" / "data" / "nni_behaviour.json"
WEIGHT_8 = {"quant_types": ["weight"], "quant_bits": 8}
FEATURES = {"quant_types": ["input"], "quant_bits": 8}


def net(norm: bool = False) -> nn.Sequential:
    """[N, 1, 4, 4] -> [N, 3]."""
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm2d(2)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 2, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def images() -> Tensor:
    """A batch."""
    return torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with a weight decay, as its group says."""
    return torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)


def qat(library: Any, model: nn.Module, rules: list[dict[str, Any]], optimizer: Any = None) -> Any:
    """A QAT_Quantizer, compressed."""
    quantizer = library.QAT_Quantizer(model, rules, optimizer or sgd(model), dummy_input=images())
    quantizer.compress()
    return quantizer


def real_weight(layer: nn.Module) -> nn.Parameter:
    """The trained weight behind a quantized layer of either library."""
    inner = layer.module if hasattr(layer, "module") else layer
    if hasattr(inner, "old_weight"):
        return inner.old_weight  # type: ignore[return-value]
    return inner.parametrizations.weight.original if hasattr(inner, "parametrizations") else inner.weight  # type: ignore


def outcome(work: Callable[[], Any]) -> str:
    """'works', or the type of the exception."""
    try:
        work()
    except Exception as error:  # any exception is a fact here
        return type(error).__name__
    return "works"


def train_once(model: nn.Module) -> None:
    """One forward and backward."""
    model.train()
    model(images()).square().sum().backward()


def delay_stops_gradients(library: Any) -> bool:
    """Whether the first layer's gradient is 0 while a later output waits for quant_start_step."""
    model = net()
    qat(library, model, [{"quant_types": ["output"], "quant_bits": 8, "quant_start_step": 9, "op_types": ["ReLU"]}])
    train_once(model)
    gradient = real_weight(model[0]).grad
    return gradient is None or not bool(gradient.any())


def delay_zeroes_evaluation(library: Any) -> bool:
    """Whether in evaluation during the delay the outputs differ from the float model's."""
    model = net()
    expected = net().eval()(images())
    qat(library, model, [{"quant_types": ["output"], "quant_bits": 8, "quant_start_step": 9, "op_types": ["ReLU"]}])
    return not torch.allclose(model.eval()(images()), expected)


def zeros_become_nan(library: Any) -> bool:
    """Whether an all-zero weight quantized per tensor affine is NaN."""
    model = net()
    with torch.no_grad():
        model[-1].weight.zero_()
    qat(library, model, [{**WEIGHT_8, "op_types": ["Linear"]}])
    return bool(model.train()(images()).isnan().any())


def lsq_weights_without_gradient(library: Any) -> bool:
    """Whether LSQ leaves a quantized weight without a gradient."""
    model = net()
    optimizer = sgd(model)
    library.LsqQuantizer(model, [{**WEIGHT_8, "op_types": ["Linear"]}], optimizer).compress()
    train_once(model)
    return real_weight(model[-1]).grad is None


def lsq_weights_alone_export(library: Any) -> str:
    """What export_model of LSQ does where no input is quantized."""
    model = net()
    quantizer = library.LsqQuantizer(model, [{**WEIGHT_8, "op_types": ["Linear"]}], sgd(model))
    quantizer.compress()
    train_once(model)
    return outcome(lambda: export(quantizer))


def observer_keeps_float_weights(library: Any) -> bool:
    """Whether the model computes with float weights after compress() of an ObserverQuantizer."""
    model = net().eval()
    expected = net().eval()(images())
    quantizer = library.ObserverQuantizer(model, [{**WEIGHT_8, "quant_bits": 8, "op_types": ["Linear"]}], sgd(model))
    with torch.no_grad():
        model(images())
        quantizer.compress()
        return torch.equal(model(images()), expected)


def naive_truncates(library: Any) -> bool:
    """Whether a weight of 0.7 steps becomes 0."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[127.0, 0.7]]))
    rules = [{**WEIGHT_8, "op_types": ["Linear"]}]
    library.NaiveQuantizer(model, rules, sgd(model)).compress()
    return model(torch.tensor([[0.0, 1.0]])).item() == 0


def naive_without_rules(library: Any) -> str:
    """What NaiveQuantizer(model), as documented, does."""
    return outcome(lambda: library.NaiveQuantizer(net()).compress())


def naive_export(library: Any) -> str:
    """What export_model of a NaiveQuantizer does."""
    model = net()
    quantizer = library.NaiveQuantizer(model, [{**WEIGHT_8, "op_types": ["Linear"]}], sgd(model))
    quantizer.compress()
    return outcome(lambda: export(quantizer))


def dorefa_skips_tanh(library: Any) -> bool:
    """Whether DoReFa's weight gets the gradient of its quantized self unchanged."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.9, -0.3]]))
    library.DoReFaQuantizer(model, [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Linear"]}], sgd(model))
    x = torch.tensor([[1.0, 2.0]])
    model(x).sum().backward()
    gradient = real_weight(model[0]).grad
    return gradient is not None and torch.equal(gradient, x)


def dorefa_zeros_become_nan(library: Any) -> bool:
    """Whether DoReFa turns an all-zero weight into NaN."""
    model = net()
    with torch.no_grad():
        model[-1].weight.zero_()
    rules = [{"quant_types": ["weight"], "quant_bits": 4, "op_types": ["Linear"]}]
    library.DoReFaQuantizer(model, rules, sgd(model)).compress()
    return bool(model(images()).isnan().any())


def dorefa_inputs(library: Any) -> str:
    """What DoReFa does with a rule for inputs."""
    model = net()
    rules = [{"quant_types": ["input"], "quant_bits": 4, "op_types": ["Linear"]}]

    def run() -> None:
        library.DoReFaQuantizer(model, rules, sgd(model)).compress()
        train_once(model)

    return outcome(run)


def export(quantizer: Any) -> dict[str, Any]:
    """What export_model returns."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = quantizer.export_model(str(Path(folder) / "model.pth"))
        return found


def channels_of_inputs_export(library: Any) -> str:
    """What export_model does with per-channel inputs."""
    model = net()
    quantizer = qat(library, model, [{**FEATURES, "op_types": ["Linear"], "quant_scheme": "per_channel_affine"}])
    train_once(model)
    return outcome(lambda: export(quantizer))


def exported_keys_of_inputs(library: Any) -> list[str]:
    """The keys of the calibration dict of an input."""
    model = net()
    quantizer = qat(library, model, [{**FEATURES, "op_types": ["Linear"]}])
    train_once(model)
    return sorted(export(quantizer)["3"])


def exported_state_loads(library: Any) -> str:
    """What a strict load of the exported state into the float model does."""
    model = net()
    quantizer = qat(library, model, [{**WEIGHT_8, "op_types": ["Conv2d", "Linear"]}])
    train_once(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        quantizer.export_model(str(path))
        return outcome(lambda: net().load_state_dict(torch.load(path, weights_only=True)))


def loaded_range_is_used(library: Any) -> bool:
    """Whether evaluation right after load_calibration_config gives what it gave before export_model."""
    model, again = net(), net()
    rules = [{**FEATURES, "op_types": ["Linear"]}]
    quantizer = qat(library, model, rules)
    train_once(model)
    expected = model.eval()(images())
    fresh = qat(library, again, rules)
    fresh.load_calibration_config(export(quantizer))
    return torch.allclose(again.eval()(images()), expected, atol=1e-6)


def loaded_range_stays(library: Any) -> bool:
    """Whether a training step with a small batch after load_calibration_config goes on from the loaded range."""
    model, again = net(), net()
    rules = [{**FEATURES, "op_types": ["Conv2d"]}]
    quantizer = qat(library, model, rules)
    train_once(model)
    fresh = qat(library, again, rules)
    fresh.load_calibration_config(export(quantizer))
    again.train()
    again(images() / 100).sum().backward()
    layer = again[0].module if hasattr(again[0], "module") else again[0]
    state = layer if hasattr(layer, "tracked_max_input") else None
    high = state.tracked_max_input if state is not None else layer.quantkern.input.running_max
    return float(high) > 0.9 * float(images().max())


def batch_norm_is_lost(library: Any) -> bool:
    """Whether a batch norm no longer normalizes behind a layer whose output is quantized and whose weight is not."""
    model = net(norm=True)
    qat(library, model, [{"quant_types": ["output"], "quant_bits": 8, "op_types": ["Conv2d"]}])
    seen: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    train_once(model)
    return float(seen[-1].mean((0, 2, 3)).abs().max()) > 0.1


def needs_dummy_input(library: Any) -> str:
    """What QAT_Quantizer does without dummy_input."""
    model = net()
    return outcome(lambda: library.QAT_Quantizer(model, [{**WEIGHT_8, "op_types": ["Linear"]}], sgd(model)))


def parameter_groups(library: Any) -> list[list[Any]]:
    """(number of parameters, weight decay) of the optimizer's groups after QAT of two weights."""
    model = net()
    optimizer = sgd(model)
    qat(library, model, [{**WEIGHT_8, "op_types": ["Conv2d", "Linear"]}], optimizer)
    return [[len(group["params"]), group["weight_decay"]] for group in optimizer.param_groups]


def exclude_false_excludes(library: Any) -> bool:
    """Whether a rule with exclude=False is taken for an exclusion."""
    model = net()
    rules = [{**WEIGHT_8, "op_types": ["Conv2d"]}, {**WEIGHT_8, "op_types": ["Linear"], "exclude": False}]
    qat(library, model, rules)
    layer = model[-1]
    return type(layer) is nn.Linear


def weight_twice_in_state(library: Any) -> bool:
    """Whether the state_dict of a model in training holds a quantized weight more than once."""
    model = net()
    qat(library, model, [{**WEIGHT_8, "op_types": ["Linear"]}])
    return sum(value.shape == (3, 8) for value in model.state_dict().values()) > 1


def lsq_scale_starts_again(library: Any) -> bool:
    """Whether a second micro-batch, before any optimizer step, makes LSQ choose the scale of an input anew."""
    model = net()
    library.LsqQuantizer(model, [{**FEATURES, "op_types": ["Conv2d"]}], sgd(model)).compress()
    model.train()
    scales = []
    for factor in (1.0, 10.0):
        model(factor * images()).square().sum().backward()
        layer = model[0].module if hasattr(model[0], "module") else model[0]
        scale = layer.input_scale if hasattr(layer, "input_scale") else layer.quantkern.input.scale
        scales.append(scale.detach().clone())
    return not torch.equal(*scales)


def folding_spoils_statistics(library: Any) -> bool:
    """Whether the running mean of a folded batch norm ends far from that of the convolution that it normalizes.

    30 training steps with a learning rate of 0, so that only statistics move; "far" is a tenth of a deviation.
    """
    means = []
    for quantized in (False, True):
        model = net(norm=True)
        with torch.no_grad():
            model[0].weight.add_(0.3)
            model[1].weight.fill_(3.0)
            model[1].bias.fill_(1.0)
        if quantized:
            qat(library, model, [{**WEIGHT_8, "op_types": ["Conv2d"]}])
        model.train()
        for _ in range(30):
            model(images() + 1)
        norm = model[0].bn_module if hasattr(model[0], "bn_module") else model[1]
        means.append((norm.running_mean.clone(), norm.running_var.sqrt()))
    (expected, deviation), (found, _) = means
    return bool(((found - expected).abs() > 0.1 * deviation).any())


FACTS: dict[str, Callable[[Any], Any]] = {
    function.__name__: function
    for function in (
        delay_stops_gradients,
        delay_zeroes_evaluation,
        zeros_become_nan,
        lsq_weights_without_gradient,
        lsq_weights_alone_export,
        observer_keeps_float_weights,
        naive_truncates,
        naive_without_rules,
        naive_export,
        dorefa_skips_tanh,
        dorefa_zeros_become_nan,
        dorefa_inputs,
        channels_of_inputs_export,
        exported_keys_of_inputs,
        exported_state_loads,
        loaded_range_is_used,
        loaded_range_stays,
        batch_norm_is_lost,
        needs_dummy_input,
        parameter_groups,
        exclude_false_excludes,
        weight_twice_in_state,
        lsq_scale_starts_again,
        folding_spoils_statistics,
    )
}


def main() -> None:
    """Run every situation with NNI and write the file."""
    import nni
    from nni.algorithms.compression.pytorch import quantization

    about = {
        "generator": "scripts/make_nni_behaviour.py",
        "nni": nni.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    facts = {name: function(quantization) for name, function in FACTS.items()}
    TABLE.write_text(json.dumps({"about": about, "facts": facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
