"""What a quantizer offers where several forwards use the same weights."""

from __future__ import annotations

from contextlib import AbstractContextManager

from quantkern.all_weights import KINDS, AllWeights
from quantkern.layer_quantizers import Kinds


class ReusesWeights:
    """The block in which weights are quantized once."""

    kinds: Kinds
    _weights: AllWeights

    def _require_attached(self, method: str) -> None:
        raise NotImplementedError(f"{type(self).__name__} must say whether {method} can be called")

    def reuse_weights(self) -> AbstractContextManager[None]:
        """A ``with`` block in which weights are quantized again only after they have changed.

        For several forwards on the same weights: the micro-batches of one optimizer step, an evaluation. Losses and
        gradients are the same to the last bit; the quantized weights stay in memory. A step inside is noticed, as is
        everything that torch counts as a write. Writes through ``.data`` are not: leave the block before them.
        Weights with a folded batch norm change with every batch and are not reused, nor are FSDP's.

        Raises:
            RuntimeError: after ``export_model``. TypeError: a quantizer whose weights are none of QAT's or LSQ's.

        >>> import torch, quantkern
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> quantizer = quantkern.NaiveQuantizer(model)
        >>> with quantizer.reuse_weights():
        ...     for micro_batch in torch.randn(8, 16, 4):
        ...         (model(micro_batch).square().mean() / 8).backward()
        """
        self._require_attached("reuse_weights")
        if self.kinds["weight"] not in KINDS:
            can = "those of QAT_Quantizer, LsqQuantizer and NaiveQuantizer can; leave out the block"
            raise TypeError(f"reuse_weights(): the weights of {type(self).__name__} cannot be reused, {can}")
        return self._weights.reuse()
