"""NaiveQuantizer: weights to 8 bits, nothing to configure."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from quantkern.attach import DummyInput
from quantkern.config import Form
from quantkern.quantizers.base import ConfigList, Quantizer

_FORM = Form(("weight",), ("quant_types", "quant_bits"), {"weight": ("per_tensor_symmetric", "int")})
_EVERY_WEIGHT = ({"quant_types": ["weight"], "quant_bits": 8, "op_types": ["default"]},)


class NaiveQuantizer(Quantizer):
    """Quantizes weights symmetrically per tensor: scale = max|w| / 127, q = rint(w / scale), ties to even.

    Args:
        model: its layers are quantized in place.
        config_list: rules with op_types, op_names, exclude, quant_types (only 'weight') and quant_bits; None: 8 bits
            for the weight of every convolution, linear, bilinear, PReLU and embedding layer.
        optimizer, dummy_input: accepted as by every quantizer; nothing here needs them.

    Raises:
        ConfigError: everything that is wrong with config_list; the model is unchanged.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[127.0, 0.7]]))
    >>> model = NaiveQuantizer(model).compress()
    >>> model(torch.ones(1, 2)).item()
    128.0
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        optimizer: Optimizer | None = None,
        dummy_input: DummyInput | None = None,
    ) -> None:
        super().__init__(model, _EVERY_WEIGHT if config_list is None else config_list, optimizer, dummy_input)

    def form(self) -> Form:
        """See ``Quantizer.form``."""
        return _FORM
