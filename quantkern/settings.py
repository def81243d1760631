"""The words of a config_list, and the scheme and dtype that a rule gets when it names none."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

QUANT_TYPES = ("input", "weight", "output")
QUANT_DTYPES = ("int", "uint")
QUANT_SCHEMES = ("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric")

FACTORY = dict.fromkeys(QUANT_TYPES, ("per_tensor_affine", "uint"))
"""NNI's defaults."""

_chosen: dict[str, tuple[str | None, str | None]] = {}


def did_you_mean(word: object, known: Collection[str]) -> str:
    """``; did you mean 'x'?`` with the known words nearest to ``word``, or nothing.

    >>> did_you_mean("quant_type", ["quant_types", "exclude"])
    "; did you mean 'quant_types'?"
    """
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), folded, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(folded[name]) for name in near)}?" if near else ""


def _require(name: str, value: object, known: Collection[str]) -> str:
    if isinstance(value, str) and value in known:
        return str(value)
    raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}{did_you_mean(value, known)}")


def set_quant_scheme_dtype(quant_type: str, new_scheme: str | None = None, new_dtype: str | None = None) -> None:
    """Choose the scheme and dtype of every later quantizer's rules that name none themselves.

    A quantizer reads them when it is built: a later call does not change quantizers that exist.

    Args:
        quant_type: 'input', 'weight' or 'output'.
        new_scheme: 'per_tensor_affine', 'per_tensor_symmetric', 'per_channel_affine' or 'per_channel_symmetric';
            None keeps the present one.
        new_dtype: 'int' (-(2**(bits-1)-1) .. 2**(bits-1)-1) or 'uint' (0 .. 2**bits-1); None keeps the present one.

    Raises:
        ValueError: a word that is none of these; nothing is changed then.

    >>> set_quant_scheme_dtype("weight", "per_channel_symmetric", "int")
    >>> default_settings()["weight"]
    ('per_channel_symmetric', 'int')
    >>> reset_quant_scheme_dtype()
    """
    quant_type = _require("quant_type", quant_type, QUANT_TYPES)
    scheme, dtype = _chosen.get(quant_type, (None, None))
    if new_scheme is not None:
        scheme = _require("new_scheme", new_scheme, QUANT_SCHEMES)
    if new_dtype is not None:
        dtype = _require("new_dtype", new_dtype, QUANT_DTYPES)
    _chosen[quant_type] = (scheme, dtype)


def reset_quant_scheme_dtype() -> None:
    """Take back every ``set_quant_scheme_dtype``: per_tensor_affine and uint for inputs, weights and outputs.

    >>> set_quant_scheme_dtype("input", new_dtype="int")
    >>> reset_quant_scheme_dtype()
    >>> default_settings()["input"]
    ('per_tensor_affine', 'uint')
    """
    _chosen.clear()


def default_settings(factory: Mapping[str, tuple[str, str]] = FACTORY) -> dict[str, tuple[str, str]]:
    """The present defaults, quant type -> (scheme, dtype): what ``set_quant_scheme_dtype`` chose, else ``factory``.

    >>> sorted(default_settings())
    ['input', 'output', 'weight']
    """
    present = {}
    for quant_type, (scheme, dtype) in factory.items():
        new_scheme, new_dtype = _chosen.get(quant_type, (None, None))
        present[quant_type] = (new_scheme or scheme, new_dtype or dtype)
    return present
