"""What ObserverQuantizer's ranges survive: exports, calibration dicts, checkpoints, other dtypes, ranks."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_networks import LAYERS, batches, calibrated, compressed, linear
from quantizer_checks import same_state, state_of
from small_quantized_net import EVERY, batch, net, rule, train
from torch import Tensor, nn

from quantkern.quantizers import LsqQuantizer, ObserverQuantizer, QAT_Quantizer

# ---------------------------------------------------------------- files


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_symmetric"])
def test_calibration_round_trip_is_exact(scheme: str, tmp_path: Path) -> None:
    rules = [{**EVERY, "op_types": ["Conv2d"], "quant_scheme": scheme, "observer": "entropy"},
             *rule("weight output", "fc", 4)]  # fmt: skip
    model, quantizer = compressed(rules)
    expected = model(batch(7))
    calibration = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
    floating = net(1).eval()
    floating.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert torch.equal(floating.conv.weight, net().conv.weight) and type(model.conv) is nn.Conv2d
    second = ObserverQuantizer(floating, rules)
    second.load_calibration_config(torch.load(tmp_path / "calibration.pt", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(floating(batch(7)), expected)
        assert second.compress() is floating
    back = second.export_model(tmp_path / "other.pt")
    for layer, entry in calibration.items():
        assert [*back[layer]] == [*entry]
        for key, value in entry.items():
            same = torch.equal(back[layer][key], value) if isinstance(value, Tensor) else back[layer][key] == value
            assert same, (layer, key)


def test_the_dict_has_nni_names(tmp_path: Path) -> None:
    model, quantizer = compressed(rule("weight input", "conv"))
    entry = quantizer.export_model(tmp_path / "model.pt")["conv"]
    nni = {f"tracked_{end}_{kind}" for end in ("min", "max", "qmin", "qmax") for kind in ("weight", "input")}
    assert nni | {"weight_bits", "input_bits"} <= set(entry)
    assert [entry[f"tracked_{end}_weight"] for end in ("qmin", "qmax")] == [-127, 127]
    assert [entry[f"tracked_{end}_input"] for end in ("qmin", "qmax")] == [0, 127]
    assert entry["tracked_max_weight"] == -entry["tracked_min_weight"]
    assert entry["tracked_max_weight"] == pytest.approx(net().conv.weight.abs().max().item())
    scale, zero_point = entry["input_scale"], entry["input_zero_point"]
    assert entry["tracked_min_input"] == pytest.approx(-zero_point * scale)


def test_a_dict_as_nni_writes_it() -> None:
    """NNI's names the ranges only."""
    given = {
        "0": {
            "weight_bits": 8, "tracked_max_weight": 1.27, "tracked_min_weight": -1.27,
            "tracked_qmin_weight": -127, "tracked_qmax_weight": 127,
            "input_bits": 8, "tracked_min_input": -0.5, "tracked_max_input": 0.77,
            "tracked_qmin_input": 0, "tracked_qmax_input": 127,
        }
    }  # fmt: skip
    layer, quantizer = linear("weight input")
    quantizer.load_calibration_config(given)
    quantizer.compress()
    own = layer.parametrizations.weight[0]
    assert own.scale.item() == pytest.approx(0.01) and layer.quantkern.input.scale.item() == pytest.approx(0.01)
    assert (own.zero_point.item(), layer.quantkern.input.zero_point.item()) == (0, 50)
    for kind in (QAT_Quantizer, LsqQuantizer):
        model = nn.Sequential(nn.Linear(6, 5))
        kind(model, rule("weight input", "0")).load_calibration_config(given)
        low, high = model[0].quantkern.input.spec.quant_range
        width = 1.27 if kind is QAT_Quantizer else 0.77 * 2
        assert model[0].quantkern.input.scale.item() == pytest.approx(width / (high - low), rel=0.01)


def test_nnis_own_chain_of_quantizers(tmp_path: Path) -> None:
    """Observer -> QAT -> LSQ with one config_list, whose defaults differ from each other."""
    rules = [
        {"quant_types": ["weight", "input"], "quant_bits": {"weight": 8, "input": 8}, "op_names": ["conv"]},
        {"quant_types": ["output", "weight", "input"], "quant_bits": {"output": 8, "weight": 8, "input": 8},
         "op_names": ["fc"]},
    ]  # fmt: skip
    calibration: dict[str, Any] | None = None
    expected = net().eval()(batch(3))
    for kind in (ObserverQuantizer, QAT_Quantizer, LsqQuantizer):
        model = net().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        if kind is QAT_Quantizer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                quantizer = kind(model, rules, optimizer, dummy_input=batch())
        else:
            quantizer = kind(model, rules, optimizer)
        if isinstance(quantizer, ObserverQuantizer):
            quantizer.calibrate([batch(3)], progress=False)
        quantizer.compress()
        if calibration is not None:
            quantizer.load_calibration_config(calibration)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = model.eval()(batch(3))
        assert 0 < (output - expected).abs().max() < 0.05 * expected.abs().max(), kind
        calibration = quantizer.export_model(tmp_path / "model.pt", tmp_path / "calibration.pt")
        assert {"conv", "fc"} == set(calibration)
        assert all("weight_scale" in entry and "input_scale" in entry for entry in calibration.values())


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_tensor_symmetric"])
@pytest.mark.parametrize("dtype", ["int", "uint"])
def test_grids_of_other_quantizers_are_converted(scheme: str, dtype: str, tmp_path: Path) -> None:
    trained = net()
    qat = QAT_Quantizer(trained, [{**LAYERS[0], "quant_scheme": scheme, "quant_dtype": dtype}])
    train(trained, None, range(2))
    expected = trained.eval()(batch(5))
    calibration = qat.export_model(tmp_path / "model.pt")
    observer = ObserverQuantizer(trained, LAYERS)
    observer.load_calibration_config(calibration)
    observer.compress()
    assert (trained(batch(5)) - expected).abs().max() < 0.06 * expected.abs().max()
    for kind in ("input", "output"):
        entry, own = calibration["conv"], trained.conv.quantkern.get_submodule(kind)
        assert own.running_max.item() == pytest.approx(entry[f"tracked_max_{kind}"], rel=1e-6)
        assert own.scale.item() * 127 >= (entry[f"tracked_max_{kind}"] - entry[f"tracked_min_{kind}"]) * 0.99
    with pytest.raises(ValueError, match="input_bits is 8, this quantizer's rule says 4"):
        ObserverQuantizer(net().eval(), rule("input", "conv", 4)).load_calibration_config(calibration)
    wrong = {"conv": {**calibration["conv"], "weight_qmin": 0.5}}
    with pytest.raises(ValueError, match="conv.weight: weight_qmin is 0.5, expected an integer"):
        ObserverQuantizer(net().eval(), rule("weight", "conv")).load_calibration_config(wrong)


def test_a_calibration_dict_of_another_model() -> None:
    model, quantizer = calibrated()
    state = state_of(model)
    with pytest.warns(UserWarning) as found:
        quantizer.load_calibration_config({"conv1": {}, "fc": {"weight_bits": 8, "input_bits": 8, "output_bits": 8}})
    said = [str(entry.message) for entry in found]
    assert "calibration_config has no layer 'conv'" in said
    assert "calibration_config has layer 'conv1', which is not quantized here; did you mean 'conv'?" in said
    assert same_state(state_of(model), state)


def test_export_needs_compress(tmp_path: Path) -> None:
    model, quantizer = calibrated()
    with pytest.raises(RuntimeError, match=r"there are no scales yet; call compress\(\) first. Nothing is changed"):
        quantizer.export_model(tmp_path / "model.pt")
    assert not any(tmp_path.iterdir())
    quantizer.compress()
    quantizer.export_model(tmp_path / "model.pt")
    assert list(model.state_dict()) == list(net().state_dict())
    with pytest.raises(RuntimeError, match="has taken the quantizers off"):
        quantizer.calibrate(batches())


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_affine"])
@pytest.mark.parametrize("observer", ["histogram", "moving_average"])
def test_resuming_from_a_state_dict_is_exact(scheme: str, observer: str) -> None:
    """In the middle of calibration, and after compress()."""
    rules = [{**EVERY, "op_types": ["Conv2d", "Linear"], "quant_scheme": scheme, "observer": observer}]

    def resumed(model: nn.Module) -> tuple[nn.Module, ObserverQuantizer]:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        fresh = net(1).eval()
        again = ObserverQuantizer(fresh, rules)
        fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
        return fresh, again

    model, quantizer = calibrated(rules, 2)
    other, again = resumed(model)
    for one, own in ((model, quantizer), (other, again)):
        one(batch(5) * 2)
        own.compress()
    assert same_state(state_of(model), state_of(other))
    assert torch.equal(model(batch(7)), other(batch(7)))
    third, finished = resumed(model)
    assert finished.is_compressed() and finished.compress() is third
    assert torch.equal(model(batch(7)), third(batch(7)))
    assert torch.equal(copy.deepcopy(model)(batch(7)), third(batch(7)))


def test_half_models_keep_float32_state() -> None:
    model, quantizer = calibrated()
    low = model.conv.quantkern.input.observer.low.clone()
    model.bfloat16()
    assert torch.equal(model.conv.quantkern.input.observer.low, low)
    model(batch(5).bfloat16())
    quantizer.compress()
    assert model.conv.quantkern.input.scale.dtype is torch.float32
    output = model(batch(6).bfloat16())
    assert output.dtype is torch.bfloat16 and output.isfinite().all()


# ---------------------------------------------------------------- ranks


def _one_rank(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        model = net().eval()
        rules = [{**EVERY, "op_types": ["Conv2d"], "quant_scheme": {"output": "per_channel_affine"}},
                 *rule("weight input", "fc", observer="minmax")]  # fmt: skip
        quantizer = ObserverQuantizer(model, rules)
        quantizer.calibrate([batch(seed) * (1 + 5 * rank) for seed in range(2 + rank)], progress=False)
        quantizer.compress()
        torch.save({key: v for key, v in model.state_dict().items() if ".observer." not in key}, f"{folder}/{rank}.pt")
        torch.distributed.barrier()
        other = ObserverQuantizer(net().eval(), LAYERS)
        if rank:
            other.calibrate([torch.full((1, 1, 6, 6), torch.nan)], progress=False)
        try:
            other.compress()
        except ValueError as error:
            Path(f"{folder}/error{rank}").write_text(str(error))
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_of_distributed_calibration_share_their_ranges(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same_state(first, second)
    alone = net().eval()
    quantizer = ObserverQuantizer(alone, rule("input", "fc", observer="minmax"))
    quantizer.calibrate([batch(0), batch(1), *(batch(seed) * 6 for seed in range(3))], progress=False)
    quantizer.compress()
    assert torch.equal(first["fc.quantkern.input.scale"], alone.fc.quantkern.input.scale)
    for rank in range(2):
        assert "conv.input holds NaN or infinity" in (tmp_path / f"error{rank}").read_text()
