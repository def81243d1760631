"""ObserverQuantizer: post-training quantization from calibration batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quantkern.attach import DummyInput, fake_quants
from quantkern.config import Extra, Form, TensorSpec
from quantkern.export.onnx_file import OnnxExport
from quantkern.files import Target
from quantkern.layer_quantizers import Kinds
from quantkern.observed import Grid, ObservedActivation, ObservedWeight
from quantkern.observers import OBSERVERS, Observer, ObserverSpec
from quantkern.progress import Progress
from quantkern.quantizers.base import ConfigList
from quantkern.quantizers.folding import FoldingQuantizer
from quantkern.ranks import agree_on_sizes
from quantkern.settings import FACTORY, QUANT_TYPES, default_settings

Observed = ObservedWeight | ObservedActivation

_KEYS = ("quant_types", "quant_bits", "quant_dtype", "quant_scheme", "ema_decay", "axis")
_FACTORY = FACTORY | {"weight": ("per_tensor_symmetric", "int")}
_DECAY = 0.9  # calibration has few batches: 0.99 would mean the first one
_EXTRAS = {
    "observer": Extra(lambda v: isinstance(v, str) and v in OBSERVERS, f"one of {', '.join(map(repr, OBSERVERS))}"),
    "percentile": Extra(lambda v: isinstance(v, float) and 50 < v <= 100, "a float above 50, 100.0 at most"),
    "reduce_range": Extra(lambda v: isinstance(v, bool), "True or False"),
}


def _refine(quant_type: str, spec: TensorSpec, given: Mapping[str, Any]) -> TensorSpec:
    """What a rule leaves open: NNI's observers, and its range of 0..127 for inputs and outputs of 8 bits."""
    assert isinstance(spec, ObserverSpec)
    weight = quant_type == "weight"
    reduced = spec.reduce_range
    if reduced is None:
        reduced = not weight and spec.bits == 8 and spec.dtype == "uint"
    least = 2 if spec.dtype == "uint" else 3
    if reduced and spec.bits < least:
        raise ValueError(
            f"reduce_range leaves nothing of {spec.bits} bits for {quant_type!r} with dtype {spec.dtype!r}; it needs "
            f"quant_bits of {least} at least"
        )
    observer = spec.observer or ("minmax" if weight else "histogram")
    decay = given.get("ema_decay", _DECAY)
    return replace(spec, reduce_range=reduced, observer=observer, ema_decay=decay)


def observer_form() -> Form:
    """What the rules of an ObserverQuantizer may hold, and their defaults at this moment."""
    return Form(QUANT_TYPES, _KEYS, default_settings(_FACTORY), 1, ObserverSpec, _EXTRAS, _refine)


def _explain_missing(names: str) -> str:
    return (
        f"compress(): only some ranks have {names}; every rank must run the same layers in calibration, and every rank "
        "must call compress()"
    )


def _share(modules: Mapping[str, Observed], observers: Mapping[str, Observer]) -> dict[str, Observer]:
    """The observers with what all ranks of torch.distributed have seen."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return dict(observers)
    sizes = agree_on_sizes({name: observer.low.numel() for name, observer in observers.items()}, None, _explain_missing)
    for name, observer in observers.items():
        if observer.low.dim() and observer.low.numel() != sizes[name] and not observer.has_seen():
            modules[name].resize(sizes[name])
    return {name: observers[name].over_ranks() for name in sorted(observers)}


class ObserverQuantizer(FoldingQuantizer):
    """Quantizes a trained model after it has observed some batches; nothing is trained.

    Until ``compress`` the model computes as before, and inputs and outputs are observed. ``compress`` chooses every
    scale and zero point and freezes them: from then on the layers compute with quantized weights, inputs and outputs.

    Args:
        model: in evaluation mode; its layers are quantized in place.
        config_list: list of rules, dicts with op_types, op_names, exclude and quant_types as for ``QAT_Quantizer``
            and the keys

            - ``quant_bits``: 1 to 16, ``quant_dtype`` and ``quant_scheme`` as for ``QAT_Quantizer``; what is not
              given is NNI's: weights per tensor symmetric, -127..127; inputs and outputs per tensor affine, unsigned.
            - ``reduce_range``: leave out the upper half of the integers. Default: for unsigned inputs and outputs of
              8 bits, which have the range 0..127 then, as in NNI; False gives 0..255.
            - ``observer``: what ranges follow from, 'minmax' (default for weights: nothing is clipped),
              'moving_average' (``ema_decay``, default 0.9), 'histogram' (default for inputs and outputs: smallest
              squared error, both ends on their own), 'mse' (smallest squared error of equal shrinkings),
              'percentile' (``percentile``, default 99.99) or 'entropy' (KL divergence).
            - ``axis``: as for ``QAT_Quantizer``.

            observer, percentile and reduce_range are one value or a dict by quant type.
        optimizer: accepted as by every quantizer; nothing here needs it.
        dummy_input, fold_bn: as for ``QAT_Quantizer``. Weights are observed and quantized with their batch norm folded
            in, by its running statistics, whatever its mode; a layer's 'output' is that of its batch norm. The
            dummy_input is not observed.

    Raises:
        ConfigError: everything that is wrong with config_list; ValueError: a model in training mode, or fold_bn=True
            as for ``QAT_Quantizer``. The model is unchanged.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> rules = [{"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Linear"]}]
    >>> quantizer = ObserverQuantizer(model, rules)
    >>> quantizer.calibrate(torch.randn(10, 16, 4), progress=False)
    10
    >>> quantizer.compress() is model
    True
    >>> steps = model[0].weight / model[0].parametrizations.weight[0].scale
    >>> torch.allclose(steps, steps.round(), atol=1e-4)
    True
    """

    kinds: Kinds = {"weight": ObservedWeight, "input": ObservedActivation, "output": ObservedActivation}

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: DummyInput | None = None,
        *,
        fold_bn: bool | None = None,
    ) -> None:
        self.choose_folding(fold_bn, None, dummy_input)
        super().__init__(model, config_list, optimizer, dummy_input)

    def form(self) -> Form:
        """See ``Quantizer.form``."""
        return observer_form()

    def refine_plans(self, model: nn.Module, plans: list[Any]) -> list[Any]:
        """Refuse a model in training mode."""
        training = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
        if training:
            shown = ", ".join(map(repr, training[:3])) + (", ..." if len(training) > 3 else "")
            raise ValueError(
                f"the model is in training mode ({shown}); ObserverQuantizer observes a model as it is in inference, "
                "call model.eval() first. The model is unchanged"
            )
        return plans

    def _tensors(self) -> dict[str, Observed]:
        """Every module that quantizes, by its label."""
        found = [module for attachment in self._attachments for module in fake_quants(attachment.layer)]
        return {module.label: module for module in found if isinstance(module, (ObservedWeight, ObservedActivation))}

    def is_compressed(self) -> bool:
        """Whether every scale is frozen."""
        return all(module.ready for module in self._tensors().values())

    def freeze_ranges(self, frozen: bool = True) -> None:
        """Let batches pass unobserved (or with False observe again), to test the float model before ``compress``."""
        super().freeze_ranges(frozen)
        for module in self._tensors().values():
            if isinstance(module, ObservedActivation):
                module.watching = not frozen

    @torch.no_grad()
    def calibrate(
        self,
        loader: Iterable[Any],
        steps: int | None = None,
        forward: Callable[[nn.Module, Any], object] | None = None,
        progress: bool = True,
    ) -> int:
        """Run batches through the model, which is put into evaluation mode, and observe them.

        Args:
            loader: gives batches: a tensor, or a tuple or list whose first entry is the model's input, or a dict of
                keyword arguments. They are moved to the model's device.
            steps: so many batches at most.
            forward: called with the model and the batch instead, for everything else.
            progress: show a progress bar on stderr.

        Returns:
            The number of batches.

        Raises:
            RuntimeError: after ``compress`` or ``export_model``. ValueError: no batch came.
        """
        self._require_whole("calibrate")
        if self.is_compressed():
            raise RuntimeError("calibrate(): compress() has frozen every scale; build a new quantizer to start again")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1 or None, got {steps}")
        model = self.bound_model.eval()
        total = min(len(loader), steps or len(loader)) if isinstance(loader, Sized) else steps
        done = 0
        with Progress(total) if progress else nullcontext() as bar:
            if bar is not None:
                bar.describe("calibration")
            for batch in loader:
                if forward is not None:
                    forward(model, batch)
                else:
                    run_batch(model, batch)
                done += 1
                if bar is not None:
                    bar.advance()
                if done == steps:
                    break
        if not done:
            raise ValueError("loader gave no batch; calibration needs one at least, about 100 images are usual")
        return done

    @torch.no_grad()
    def compress(self) -> nn.Module:
        """Choose every scale and zero point and freeze them; the user's own model object, quantized.

        With torch.distributed initialised the ranges and histograms of all ranks count together, and every rank must
        call it. Calling it again is harmless. An input or output that calibration has not reached stays float, with
        a warning.

        Raises:
            RuntimeError: no batch has been observed, or the model is in training mode. ValueError: NaN or infinity
                in a batch or a weight. Nothing is changed then.
        """
        self._require_whole("compress")
        tensors = self._tensors()
        waiting = {label: module for label, module in tensors.items() if not module.ready}
        if not waiting:
            return self.bound_model
        if self.bound_model.training:
            raise RuntimeError("compress(): the model is in training mode; call model.eval() first")
        grids, unseen = self._grids(waiting)
        for label, module in waiting.items():
            module.freeze(grids.get(label))  # type: ignore[arg-type]
        if unseen:
            warnings.warn(f"not seen in calibration, stays float: {', '.join(unseen)}", UserWarning, stacklevel=2)
        return self.bound_model

    def _grids(self, waiting: Mapping[str, Observed]) -> tuple[dict[str, Grid], list[str]]:
        """The grids of what has been observed, and the labels of what has not."""
        activations = {label: module for label, module in waiting.items() if isinstance(module, ObservedActivation)}
        observers = _share(waiting, {label: module.observer for label, module in activations.items()})
        unseen = [label for label, observer in observers.items() if not observer.has_seen()]
        if activations and len(unseen) == sum(isinstance(m, ObservedActivation) for m in self._tensors().values()):
            raise RuntimeError(
                f"compress(): no calibration batch has been seen by {', '.join(unseen)}; run some in evaluation mode, "
                "for example calibrate(loader). Nothing is changed"
            )
        for attachment in self._attachments:
            if isinstance(attachment.weight, ObservedWeight) and attachment.weight.label in waiting:
                weight = attachment.layer.weight
                assert isinstance(weight, Tensor)
                observers[attachment.weight.label] = attachment.weight.observe(weight)
        seen = {label: observer for label, observer in observers.items() if label not in unseen}
        problems = [text for text in (observer.damage() for observer in seen.values()) if text]
        if problems:
            lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
            raise ValueError(f"compress(): there are values that no grid holds, nothing is changed:{lines}")
        return {label: observer.calculate_qparams() for label, observer in seen.items()}, unseen

    def _require_compressed(self, method: str) -> None:
        self._require_whole(method)
        if not self.is_compressed():
            raise RuntimeError(f"{method}(): there are no scales yet; call compress() first. Nothing is changed")

    def export_onnx(self, *args: Any, **kwargs: Any) -> OnnxExport:
        """As ``Quantizer.export_onnx``, after ``compress``.

        Raises:
            RuntimeError: before ``compress``. Others as ``Quantizer.export_onnx``.
        """
        self._require_compressed("export_onnx")
        return super().export_onnx(*args, **kwargs)

    def export_model(
        self,
        model_path: Target,
        calibration_path: Target | None = None,
        onnx_path: Target | None = None,
        input_shape: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """As ``Quantizer.export_model``, after ``compress``; weights have ``tracked_*`` ranges too, as NNI writes them.

        Raises:
            RuntimeError: before ``compress``. Others as ``Quantizer.export_model``.
        """
        self._require_compressed("export_model")
        return super().export_model(model_path, calibration_path, onnx_path, input_shape, device)


def run_batch(model: nn.Module, batch: object) -> object:
    """What the model returns for a batch of a loader, which is moved to the model's device."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    raise TypeError(
        f"a batch is {type(batch).__name__}, expected a tensor, a tuple or list that starts with one, or a dict of "
        "keyword arguments; for others give forward=lambda model, batch: ..."
    )
