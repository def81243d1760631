"""DoReFaQuantizer: low-bit weights, activations and gradients (Zhou et al. 2016)."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from quantkern.attach import DummyInput
from quantkern.config import Extra, Form, is_int
from quantkern.layer_quantizers import Kinds
from quantkern.learned import DorefaActivation, DorefaGradient, DorefaSpec, DorefaWeight
from quantkern.quantizers.base import ConfigList, Quantizer, require_parameters_of

_TYPES = ("input", "weight", "output", "gradient")
_SEED = Extra(lambda v: is_int(v) and 0 <= v < 1 << 63, "an integer from 0 to 2**63 - 1")
_FORM = Form(
    _TYPES,
    ("quant_types", "quant_bits"),
    dict.fromkeys(_TYPES, ("per_tensor_affine", "uint")),
    spec=DorefaSpec,
    extras={"seed": _SEED},
)


class DoReFaQuantizer(Quantizer):
    """Trains with low-bit weights, activations and gradients.

    Weights go through tanh into [-1, 1], with their true gradient; inputs and outputs are clipped to [0, 1];
    gradients are rounded at random. Source: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural
    Networks with Low Bitwidth Gradients", 2016; the formulas stand at ``quantkern.functional.dorefa_weight``,
    ``dorefa_activation`` and ``dorefa_gradient``.

    Args:
        model: its layers are quantized in place; float32, float16 or bfloat16.
        config_list: list of rules, dicts with op_types, op_names and exclude as for ``QAT_Quantizer`` and the keys

            - ``quant_types``: 'weight', 'input', 'output', 'gradient', one or a list. 'gradient' is the gradient
              with respect to the layer's output, as it enters the layer's backward; in training only.
            - ``quant_bits``: 1 to 16, one number or a dict by quant type.
            - ``seed``: makes the noise of gradients reproducible, whatever else draws random numbers; without it
              every forward draws from torch's generator.

        optimizer, dummy_input: accepted as by every quantizer; nothing here needs them.

    Raises:
        ConfigError: everything that is wrong with config_list; ValueError: an optimizer that holds none of the
            model's parameters. Nothing is changed then.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> rules = [{"quant_types": ["weight", "gradient"], "quant_bits": {"weight": 2, "gradient": 6},
    ...           "op_types": ["default"]}]
    >>> model = DoReFaQuantizer(model, rules).compress()
    >>> model[0].weight.unique().numel() <= 4
    True
    >>> model(torch.rand(16, 4)).square().sum().backward()
    """

    kinds: Kinds = {
        "weight": DorefaWeight,
        "input": DorefaActivation,
        "output": DorefaActivation,
        "gradient": DorefaGradient,
    }

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: DummyInput | None = None,
    ) -> None:
        super().__init__(model, config_list, optimizer, dummy_input)

    def form(self) -> Form:
        """See ``Quantizer.form``."""
        return _FORM

    def check_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """See ``Quantizer.check_optimizer``."""
        require_parameters_of(model, optimizer)
