"""What every quantizer does: validate, attach, export, load a calibration dict."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from quantkern.all_weights import AllWeights
from quantkern.attach import Attachment, DummyInput, OptimizerStepCounter, run_dummy
from quantkern.config import Form, LayerPlan
from quantkern.current_range import WeightFakeQuant
from quantkern.export.biases import round_biases
from quantkern.export.lowering import Options
from quantkern.export.onnx_file import OnnxExport, export_onnx, save_float
from quantkern.export.tracing import sample_input
from quantkern.export.verify import MAX_MEAN_STEPS
from quantkern.files import Target, publish, save, stage, target_of, writing
from quantkern.layer_plans import plan_layers
from quantkern.layer_quantizers import Kinds, Sizes
from quantkern.lean_backward import LeanActivations
from quantkern.quantizers.calibration import actions_of
from quantkern.quantizers.reusing import ReusesWeights
from quantkern.ranks import keep_from_ddp, require_whole
from quantkern.report import MAX_SATURATION, MIN_SQNR, Report, make_report
from quantkern.running_range import ActivationFakeQuant
from quantkern.watching import StillThere

ConfigList = Sequence[Mapping[str, Any]]


class Quantizer(ReusesWeights, nn.Module):
    """A model and the fake-quantizers on it; called like the model, which stays reachable as ``bound_model``.

    The constructor checks everything and then puts the quantizers on the model's own layers. No module is renamed
    or replaced, every Parameter stays the same object, and ``export_model`` takes everything off again. As in the
    float model, ``layer.weight = nn.Parameter(...)`` gives a layer another weight.
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
        self._lean = LeanActivations(model)
        self._attach()
        self._weights = AllWeights(model, (attachment.weight for attachment in self._attachments))
        self._hooks: list[RemovableHandle] = self._weights.attach(model)
        watch = StillThere(model, ((attachment.name, attachment.layer) for attachment in self._attachments))
        self._hooks.append(model.register_forward_pre_hook(watch))
        if optimizer is not None and delayed:
            self._hooks.append(optimizer.register_step_post_hook(OptimizerStepCounter(delayed)))
        self._exported = False
        self.training = model.training
        self.bound_model = model
        self._keep_from_ddp(True)

    def _keep_from_ddp(self, keep: bool) -> None:
        for module in (self, self.bound_model):
            keep_from_ddp(module, keep)

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
        self._lean.attach()

    def _detach(self) -> None:
        self._lean.detach()
        for attachment in self._attachments:
            attachment.detach()

    def _require_attached(self, method: str) -> None:
        if self._exported:
            raise RuntimeError(
                f"{method}(): export_model() has taken the quantizers off this model, it is a float model again; "
                "build a new quantizer, and load_calibration_config() to go on from the exported numbers"
            )

    def _require_unchanged(self, method: str) -> None:
        self._require_attached(method)
        present = set(self.bound_model.modules())
        problems = [text for text in (attachment.damage(present) for attachment in self._attachments) if text]
        if problems:
            lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
            raise RuntimeError(
                f"{method}(): the model was changed after it was quantized:{lines}\nPut back what was there, or build "
                "the model anew, load this one's weights, change it and then quantize it. Nothing is changed"
            )

    def _require_whole(self, method: str) -> None:
        self._require_unchanged(method)
        require_whole(self.bound_model, method)

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """What the model returns."""
        return self.bound_model(*args, **kwargs)

    def compress(self) -> nn.Module:
        """The user's own model object, quantized. The constructor has done the work; calling twice is harmless.

        Raises:
            RuntimeError: after ``export_model``, or a quantized layer or its quantizers are no longer in the model.
        """
        self._require_unchanged("compress")
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
            calibration_path: receives the calibration dict; ``torch.load(..., weights_only=True)`` reads both, and
                ``quantkern.load`` notices damage.
            onnx_path: receives the float model as ONNX; needs ``input_shape`` and the packages onnx and onnxscript.
            input_shape, device: of the input that the ONNX export runs; by default on the model's device.

        Returns:
            Layer name -> NNI's keys (``weight_bits``, ``weight_scale``, ``tracked_min_input``, ...) and for each
            quantized tensor ``*_scale``, ``*_zero_point``, ``*_dtype``, ``*_scheme``, ``*_qmin``, ``*_qmax`` and
            ``*_axis``. Weight scales and zero points are 1-d tensors, everything of an input or output is a number
            per tensor and a list per channel. An input or output that was never seen has no range and no scale.

        Raises:
            TypeError, ValueError, ImportError, OSError: before anything is changed. Files appear whole or not at all
                and never beside the file of an earlier export under another of the paths.
        """
        self._require_whole("export_model")
        paths = {"model_path": model_path, "calibration_path": calibration_path, "onnx_path": onnx_path}
        given = {name: path for name, path in paths.items() if path is not None or name == "model_path"}
        targets = {name: target_of(name, path) for name, path in given.items()}
        if len(set(targets.values())) < len(targets):
            raise ValueError(
                f"{', '.join(targets)} must be different files, got {', '.join(map(str, targets.values()))}"
            )
        sample = sample_input(self.bound_model, input_shape, device) if onnx_path is not None else None
        calibration = {attachment.name: attachment.calibration() for attachment in self._attachments}
        self._warn_about_unseen(calibration)
        with ExitStack() as stack:
            folders = {name: stage(stack, name, target) for name, target in targets.items()}
            self._keep_from_ddp(False)
            staged = {name: folder / targets[name].name for name, folder in folders.items()}
            self._detach()
            try:
                with writing("model_path", targets["model_path"]):
                    save(self.bound_model.state_dict(), staged["model_path"])
                if calibration_path is not None:
                    with writing("calibration_path", targets["calibration_path"]):
                        save(calibration, staged["calibration_path"])
                if sample is not None:
                    with writing("onnx_path", targets["onnx_path"]):
                        save_float(self.bound_model, sample, folders["onnx_path"], targets["onnx_path"].name)
                publish(folders, targets)
            except BaseException:
                self._attach()
                self._keep_from_ddp(True)
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
        self._require_whole("report")
        notes = self._config_notes
        return make_report(self, self.bound_model, self._attachments, batch, notes, max_saturation, min_sqnr)

    def round_biases(self) -> dict[str, float]:
        """Round the biases of layers with a quantized input and weight to what an int32 bias holds.

        ::

            bias = rint(bias / (input_scale * weight_scale)) * (input_scale * weight_scale)

        A folded batch norm's beta moves as far. The change is less than anything the layer resolves, but it decides
        some roundings behind it: with it the model has the numbers of ``export_onnx``'s file, not only nearly. Call
        it after training and before the last test. A layer whose 'input' no rule quantizes, or that has no bias or
        no scale yet, stays as it is. Source: Jacob et al. 2018, section 2.4.

        Returns:
            Layer name -> the largest change of its bias.

        Raises:
            RuntimeError: after ``export_model``.
        """
        self._require_whole("round_biases")
        return round_biases(self.bound_model, self._attachments)

    def export_onnx(
        self,
        path: Target,
        example_input: DummyInput,
        verify: bool = True,
        *,
        dynamic_batch: bool = True,
        max_mean_steps: float = MAX_MEAN_STEPS,
        int4: bool | None = None,
        int32_bias: bool = True,
        signed_weights: bool = False,
    ) -> OnnxExport:
        """Write the quantized model as ONNX and compare the file with the model; the model stays as it is.

        The file holds integers with DequantizeLinear nodes for weights, and QuantizeLinear and DequantizeLinear nodes
        for inputs and outputs, so that onnxruntime computes layers in integers whose input, weight and output are
        quantized. Folded batch norms are part of weight and bias. The numbers are those of the model in evaluation
        mode; what rounds differently is ``x / scale`` for ``x * (1 / scale)``, the order of sums, int32 biases (see
        ``round_biases``), and the learned zero points of LSQ+, which become integers. Binary layers and tensors that
        have no scale yet stay float.

        Args:
            path: the file, opset 21.
            example_input: a tensor, a tuple of the model's arguments or a dict of its keyword arguments.
            verify: run the file with onnxruntime on example_input, and print the differences of every output in steps
                (the scale of the output's fake-quantizer, else its range / 255) and the SQNR.
            dynamic_batch: the first axis of every tensor that is as long as the first one's may have any length.
            max_mean_steps: the largest mean difference of an output that is no drift.
            int4: store weights of up to 4 bits in 4; onnxruntime then computes their layers in float. None (default):
                only where the layer's input is not quantized.
            int32_bias: store the bias of layers with a quantized input and weight as int32.
            signed_weights: False stores weights as uint8 whose products could saturate in the kernels of x86 CPUs
                without VNNI; True keeps int8, which needs onnxruntime's session option
                ``session.x64quantprecision`` = "1" there.

        Returns:
            The numbers, to print or to read.

        Raises:
            DriftError: the file gives other numbers; no file is written then. RuntimeError: after ``export_model``,
                or an ObserverQuantizer before ``compress``. ImportError: packages of the extra 'onnx' are missing.
            TypeError, ValueError, OSError: path or example_input do not fit, or the model cannot be traced.
        """
        self._require_whole("export_onnx")
        return export_onnx(
            self.bound_model,
            self._attachments,
            path,
            example_input,
            verify_file=verify,
            dynamic_batch=dynamic_batch,
            max_mean_steps=max_mean_steps,
            options=Options(int4, int32_bias, signed_weights),
        )

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

    def load_calibration_config(self, calibration_config: Mapping[str, Mapping[str, Any]] | Target) -> None:
        """Go on from exported numbers: ranges, scales and zero points, all exactly, or nothing.

        Give the path of the file, and it is read by ``quantkern.load``, which notices damage; or give the dict.

        Evaluation uses them at once; in training the moving averages go on from them. Dicts written by NNI 2.x,
        which lack the scales of inputs and outputs, are read too.

        Raises:
            ValueError: entries that contradict the rules (bits, granularity, axis, channels) or are no numbers; all
                of them at once, nothing is changed. A grid of another dtype, symmetry or range of integers becomes
                the one that the rule gives the same range. Layers missing on either side are a warning, as in NNI;
                a dict that has none of the quantized layers is an error. A damaged file is one too.
            OSError: there is no such file.
        """
        self._require_whole("load_calibration_config")
        for action in actions_of(calibration_config, self._attachments):
            action()


def require_parameters_of(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that trains another model."""
    own = {id(parameter) for parameter in model.parameters()}
    if own and not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "optimizer holds none of the model's parameters; build it from model.parameters() of this very model. "
            "The model and the optimizer are unchanged"
        )
