"""What every quantizer does: validate, attach, export, load a calibration dict."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from quantkern.attach import Attachment, DummyInput, Kinds, OptimizerStepCounter, Sizes, run_dummy
from quantkern.config import Form, LayerPlan, plan_layers
from quantkern.fake_quant import ActivationFakeQuant, WeightFakeQuant
from quantkern.files import Target, stage, target_of
from quantkern.report import MAX_SATURATION, MIN_SQNR, Report, make_report
from quantkern.settings import did_you_mean

ConfigList = Sequence[Mapping[str, Any]]


class Quantizer(nn.Module):
    """A model and the fake-quantizers on it; called like the model, which stays reachable as ``bound_model``.

    The constructor checks everything and then puts the quantizers on the model's own layers. No module is renamed
    or replaced, every Parameter stays the same object, and ``export_model`` takes everything off again.
    """

    bound_model: nn.Module
    kinds: Kinds = {"weight": WeightFakeQuant, "input": ActivationFakeQuant, "output": ActivationFakeQuant}

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: DummyInput | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("model is a DistributedDataParallel; quantize the model first, then wrap it")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
        if isinstance(model, nn.DataParallel):
            model = model.module
        if optimizer is not None:
            self.check_optimizer(model, optimizer)
        self._config_notes: list[str] = []
        plans = plan_layers(model, config_list, self.form(), stacklevel=4, notes=self._config_notes)
        sizes: dict[str, Sizes] = {}
        if dummy_input is not None:
            sizes = run_dummy(model, plans, dummy_input)
        plans = self.fold_batch_norms(model, plans, sizes, dummy_input)
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        plans = self.refine_plans(model, plans)
        self._attachments = [self._prepare(plan, sizes, device, optimizer is None) for plan in plans]
        delayed = [attachment.layer for attachment in self._attachments if attachment.delayed]
        self._attach()
        self._hooks: list[RemovableHandle] = []
        if optimizer is not None and delayed:
            self._hooks.append(optimizer.register_step_post_hook(OptimizerStepCounter(delayed)))
        self._exported = False
        self.training = model.training
        self.bound_model = model

    def form(self) -> Form:
        """Which keys and quant types this quantizer's rules have, and their defaults at this moment."""
        raise NotImplementedError(f"{type(self).__name__} must say what its rules may hold: def form(self) -> Form")

    def check_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called before anything is changed; ``require_parameters_of`` is a check to make here."""

    def fold_batch_norms(
        self, model: nn.Module, plans: list[LayerPlan], sizes: Mapping[str, Sizes], dummy_input: DummyInput | None
    ) -> list[LayerPlan]:
        """Called before anything is changed; the plans, with the batch norms to fold. ``sizes``: of ``run_dummy``."""
        return plans

    def refine_plans(self, model: nn.Module, plans: list[LayerPlan]) -> list[LayerPlan]:
        """Called last before anything is changed; the plans to follow."""
        return plans

    def _prepare(
        self, plan: LayerPlan, sizes: Mapping[str, Sizes], device: torch.device, count_forwards: bool
    ) -> Attachment:
        return Attachment(plan, self.kinds, sizes.get(plan.name, {}), device, count_forwards)

    def _attach(self) -> None:
        done: list[Attachment] = []
        try:
            for attachment in self._attachments:
                done.append(attachment)
                attachment.attach()
        except BaseException:
            for attachment in reversed(done):
                attachment.detach()
            raise

    def _require_attached(self, method: str) -> None:
        if self._exported:
            raise RuntimeError(
                f"{method}(): export_model() has taken the quantizers off this model, it is a float model again; "
                "build a new quantizer, and load_calibration_config() to go on from the exported numbers"
            )

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """What the model returns."""
        return self.bound_model(*args, **kwargs)

    def compress(self) -> nn.Module:
        """The user's own model object, quantized. The constructor has done the work; calling twice is harmless."""
        self._require_attached("compress")
        return self.bound_model

    def freeze_ranges(self, frozen: bool = True) -> None:
        """Stop (or with False resume) following the ranges of inputs and outputs in training forwards."""
        for module in self.bound_model.modules():
            if isinstance(module, ActivationFakeQuant):
                module.observing.fill_(not frozen)

    def export_model(
        self,
        model_path: Target,
        calibration_path: Target | None = None,
        onnx_path: Target | None = None,
        input_shape: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Take the quantizers off, save the plain float model and return the calibration dict.

        Args:
            model_path: receives the float state_dict, which loads strictly into the model's own class.
            calibration_path: receives the calibration dict; ``torch.load(..., weights_only=True)`` reads both.
            onnx_path: receives the float model as ONNX; needs ``input_shape`` and the packages onnx and onnxscript.
            input_shape, device: of the input that the ONNX export runs; by default on the model's device.

        Returns:
            Layer name -> NNI's keys (``weight_bits``, ``weight_scale``, ``tracked_min_input``, ...) and for each
            quantized tensor ``*_scale``, ``*_zero_point``, ``*_dtype``, ``*_scheme``, ``*_qmin``, ``*_qmax`` and
            ``*_axis``. Weight scales and zero points are 1-d tensors, everything of an input or output is a number
            per tensor and a list per channel. An input or output that was never seen has no range and no scale.

        Raises:
            TypeError, ValueError, ImportError, OSError: before anything is changed. Files appear whole or not at all.
        """
        self._require_attached("export_model")
        paths = {"model_path": model_path, "calibration_path": calibration_path, "onnx_path": onnx_path}
        given = {name: path for name, path in paths.items() if path is not None or name == "model_path"}
        targets = {name: target_of(name, path) for name, path in given.items()}
        if len(set(targets.values())) < len(targets):
            raise ValueError(
                f"{', '.join(targets)} must be different files, got {', '.join(map(str, targets.values()))}"
            )
        sample = _onnx_input(self.bound_model, input_shape, device) if onnx_path is not None else None
        calibration = {attachment.name: attachment.calibration() for attachment in self._attachments}
        self._warn_about_unseen(calibration)
        with ExitStack() as stack:
            folders = {name: stage(stack, name, target) for name, target in targets.items()}
            staged = {name: folder / targets[name].name for name, folder in folders.items()}
            for attachment in self._attachments:
                attachment.detach()
            try:
                torch.save(self.bound_model.state_dict(), staged["model_path"])
                if calibration_path is not None:
                    torch.save(calibration, staged["calibration_path"])
                if sample is not None:
                    _export_onnx(self.bound_model, sample, staged["onnx_path"])
                for name, folder in folders.items():
                    for file in folder.iterdir():  # more than one for an ONNX model over 2 GB
                        file.replace(targets[name].parent / file.name)
            except BaseException:
                self._attach()
                raise
        for hook in self._hooks:
            hook.remove()
        self._exported = True
        return calibration

    def report(
        self, batch: DummyInput | None = None, max_saturation: float = MAX_SATURATION, min_sqnr: float = MIN_SQNR
    ) -> Report:
        """What quantization does to every tensor, and what looks wrong; ``print`` it, or ``.to_html(path)``.

        Nothing changes: parameters, gradients, buffers, modes and the states of random generators stay as they are.
        It may be called at any time, in training and in evaluation mode.

        Args:
            batch: runs once through the model in evaluation mode, and every quantized tensor is measured: a tensor, a
                tuple of positional arguments or a dict of keyword arguments, as for dummy_input. None: weights are
                measured, of inputs and outputs the report has what is known without a batch.
            max_saturation: warn where more than so many percent of a tensor's values are clipped.
            min_sqnr: warn where the signal-to-quantization-noise ratio is below so many dB.

        Returns:
            A ``quantkern.report.Report``; its docstring explains the columns and lists the warnings.

        Raises:
            RuntimeError: after ``export_model``. ValueError: the model does not run on batch.

        >>> import torch, quantkern
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = quantkern.NaiveQuantizer(model).report()
        >>> [(row.layer, row.tensor, row.bits) for row in report.rows]
        [('0', 'weight', 8), ('2', 'weight', 8)]
        """
        self._require_attached("report")
        notes = self._config_notes
        return make_report(self, self.bound_model, self._attachments, batch, notes, max_saturation, min_sqnr)

    def _warn_about_unseen(self, calibration: Mapping[str, Mapping[str, Any]]) -> None:
        for attachment in self._attachments:
            entry = calibration[attachment.name]
            for kind in ("input", "output"):
                seen = any(key.startswith(f"tracked_min_{kind}") for key in entry)
                if f"{kind}_qmin" in entry and not seen:
                    self._warn_unseen(kind, attachment.name, "range and no scale")
            if "weight_qmin" in entry and "weight_scale" not in entry:
                self._warn_unseen("weight", attachment.name, "scale")

    @staticmethod
    def _warn_unseen(kind: str, layer: str, missing: str) -> None:
        text = f"the {kind} of layer {layer!r} was never seen in training: the calibration dict has no {missing} for it"
        warnings.warn(text, UserWarning, stacklevel=5)

    def load_calibration_config(self, calibration_config: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from exported numbers: ranges, scales and zero points, all exactly, or nothing.

        Evaluation uses them at once; in training the moving averages go on from them. Dicts written by NNI 2.x,
        which lack the scales of inputs and outputs, are read too.

        Raises:
            ValueError: entries that contradict the rules (bits, granularity, axis, channels) or are no numbers; all
                of them at once, nothing is changed. A grid of another dtype, symmetry or range of integers becomes
                the one that the rule gives the same range. Layers missing on either side are a warning, as in NNI;
                a dict that has none of the quantized layers is an error.
        """
        self._require_attached("load_calibration_config")
        if not isinstance(calibration_config, Mapping):
            kind = type(calibration_config).__name__
            raise TypeError(f"calibration_config must be a dict of layer name -> dict, got {kind}; torch.load() a file")
        problems: list[str] = []
        actions: list[Callable[[], None]] = []
        names = [attachment.name for attachment in self._attachments]
        _require_a_layer_of(calibration_config, names)
        for attachment in self._attachments:
            if attachment.name not in calibration_config:
                warnings.warn(f"calibration_config has no layer {attachment.name!r}", UserWarning, stacklevel=2)
            elif not isinstance(calibration_config[attachment.name], Mapping):
                problems.append(f"{attachment.name}: {calibration_config[attachment.name]!r} is no dict")
            else:
                actions += attachment.read_calibration(calibration_config[attachment.name], problems)
        for name in calibration_config:
            if name not in names:
                text = f"calibration_config has layer {name!r}, which is not quantized here{did_you_mean(name, names)}"
                warnings.warn(text, UserWarning, stacklevel=2)
        if problems:
            lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
            raise ValueError(f"calibration_config does not fit, nothing was loaded:{lines}")
        for action in actions:
            action()


def require_parameters_of(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that trains another model."""
    own = {id(parameter) for parameter in model.parameters()}
    if own and not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "optimizer holds none of the model's parameters; build it from model.parameters() of this very model. "
            "The model and the optimizer are unchanged"
        )


def _require_a_layer_of(calibration_config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a dict that has none of the quantized layers: it is another model's."""
    if any(name in calibration_config for name in names):
        return
    lines = "".join(f"\n  {name!r} is not quantized here{did_you_mean(name, names)}" for name in calibration_config)
    raise ValueError(
        "calibration_config is of another model: it has none of the quantized layers "
        f"{', '.join(map(repr, names))}. Nothing was loaded{':' + lines if lines else ', it is empty'}"
    )


def _onnx_input(model: nn.Module, shape: Sequence[int] | None, device: torch.device | str | None) -> torch.Tensor:
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) for size in shape):
        raise ValueError(f"onnx_path needs input_shape, a tuple such as (1, 3, 32, 32); got {shape!r}")
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install onnx onnxscript")
    own = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return torch.zeros(tuple(shape), device=own if device is None else device)


def _export_onnx(model: nn.Module, sample: torch.Tensor, path: Path) -> None:
    """The float model in evaluation mode; every module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        torch.onnx.export(model.eval(), (sample,), path, external_data=False)
    finally:
        for module, training in modes:
            module.training = training
