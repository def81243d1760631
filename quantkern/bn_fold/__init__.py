"""Batch norms folded into the weights before them: which can be, the layers that train so, the folded float model."""

from quantkern.bn_fold.attachment import FoldedAttachment, fold_model
from quantkern.bn_fold.layers import FOLDED_LAYERS, Folding
from quantkern.bn_fold.pairs import Pairs, find_pairs, float_class

__all__ = ["FOLDED_LAYERS", "FoldedAttachment", "Folding", "Pairs", "find_pairs", "float_class", "fold_model"]
