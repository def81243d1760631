"""QAT_Quantizer: training with simulated quantization (Jacob et al. 2018)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from quantkern.attach import DummyInput
from quantkern.config import Form
from quantkern.quantizers.base import ConfigList
from quantkern.quantizers.folding import FoldingQuantizer
from quantkern.ranks import RangeSharing
from quantkern.settings import QUANT_TYPES, default_settings

_KEYS = ("quant_types", "quant_bits", "quant_dtype", "quant_scheme", "quant_start_step", "ema_decay", "axis")


class QAT_Quantizer(FoldingQuantizer):  # noqa: N801  (NNI's name)
    """Simulates quantized inference while a model trains, with straight-through gradients.

    Weights are quantized with their current range, inputs and outputs with a moving average of theirs. Source: Jacob
    et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018.

    Args:
        model: its layers are quantized in place. The optimizer may be built before or after.
        config_list: list of rules, dicts with the keys

            - ``op_types``, ``op_names``: class names and dotted module names; 'default' stands for every convolution,
              linear, bilinear, PReLU and embedding layer. A layer must match both where both are given, and the
              last rule that matches it counts. ``exclude: True`` takes matching layers out.
            - ``quant_types``: 'weight', 'input', 'output', one or a list.
            - ``quant_bits``: 1 to 16, one number or a dict by quant type.
            - ``quant_dtype``: 'int' or 'uint'; ``quant_scheme``: 'per_tensor_affine', 'per_tensor_symmetric',
              'per_channel_affine', 'per_channel_symmetric'; one for all or a dict by quant type. What is not given
              comes from ``set_quant_scheme_dtype``.
            - ``quant_start_step``: the rule's layers stay float until this many steps are finished; default 0.
            - ``ema_decay``: weight of the past in the moving averages; default 0.99.
            - ``axis``: the channel axis per channel, a number or a dict by quant type; default 0 for weights (1 for
              transposed convolutions) and 1 for inputs and outputs.

        optimizer: counts the steps for quant_start_step where given; else a layer's training forwards are its steps,
            every micro-batch and every recomputed forward too.
        dummy_input: a tensor, tuple or dict to run the model on once, so that every per-channel size is known from
            the start. Without it they are known from the first batch at the latest.
        fold_bn: whether the batch norm behind a convolution or linear layer with a quantized weight is folded into
            that weight before it is quantized, as inference has it; None (default): where dummy_input is given, as in
            NNI. A layer's 'output' then is that of its batch norm. Batch norms are found in the model's graph, or on
            dummy_input where torch.fx cannot trace the model; one that is not the only reader of the layer's output
            stays as it is, with a warning. Call ``convert_sync_batchnorm`` before, not after.
        freeze_bn_step: after this many steps the folded batch norms keep their statistics; None (default): never.
            Steps are counted as for quant_start_step. In compiled training without an optimizer here the change
            comes with the next ``model.train()``. Lower the learning rate then: fixed statistics no longer make up
            for large steps, in float networks neither. Below 4 bits give it, or a per-channel quant_scheme: only with
            fixed statistics does training see how few steps a weight of small gamma has among the others.

    Raises:
        ConfigError: everything that is wrong with config_list; ValueError: fold_bn=True without dummy_input for a
            model that cannot be traced. The model is unchanged then.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> rules = [{"quant_types": ["weight", "input"], "quant_bits": 8, "op_types": ["Linear"]}]
    >>> quantizer = QAT_Quantizer(model, rules)
    >>> quantizer.compress() is model
    True
    >>> model(torch.randn(16, 4)).sum().backward()
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: DummyInput | None = None,
        *,
        fold_bn: bool | None = None,
        freeze_bn_step: int | None = None,
    ) -> None:
        self.choose_folding(fold_bn, freeze_bn_step, dummy_input)
        super().__init__(model, config_list, optimizer, dummy_input)
        self._sharing = RangeSharing()
        if any(attachment.tensors is not None for attachment in self._attachments):
            self._hooks.append(self.bound_model.register_forward_hook(self._sharing))

    def share_ranges(self, enabled: bool = True, group: Any = None) -> None:
        """Whether the ranks of distributed training share the ranges of inputs and outputs; they do by default.

        ::

            running_min = the smallest of all ranks', running_max = the largest

        One collective at the end of a training forward does it for the whole model, and scales follow. A running
        range then is the moving average of the range of the global batch. In the forward itself a rank quantizes with
        the running range that its own part of the batch has moved, so that no layer waits for other ranks. A rank
        that sees nothing of a tensor in a step (no sample, an unused layer) holds its range where it was: it can grow
        in that step and not shrink.

        By default the ranks are those of the DistributedDataParallel that runs the forward, or all ranks where
        ``fully_shard`` has sharded the model. Under DistributedDataParallel forwards inside ``no_sync()`` share
        nothing: ranks follow their own batches, and the next shared forward takes the smallest and largest of their
        moving averages. Forwards without gradients and forwards inside ``join()`` share nothing. Ranks agree on the
        tensors in their first shared forward; call this again on every rank where the model changes afterwards.
        Shared ranges need no broadcast of buffers in DistributedDataParallel.

        Args:
            enabled: False: ranges stay each rank's own. DistributedDataParallel then broadcasts those of rank 0 before
                every forward, unless built with ``broadcast_buffers=False``; ``fully_shard`` leaves them different.
            group: process group whose ranks run all training forwards together, for other kinds of parallel training.

        Raises:
            RuntimeError: in a forward, on every rank: ranks know different tensors or channels of one; give
                dummy_input, so that all are known from the start.
        """
        self._require_attached("share_ranges")
        self._sharing.set(enabled, group)

    def form(self) -> Form:
        """See ``Quantizer.form``."""
        return Form(QUANT_TYPES, _KEYS, default_settings())
