"""A calibration dict or file, compared with the layers of a quantizer before anything is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantkern.attach import Attachment
from quantkern.files import Target, load
from quantkern.settings import did_you_mean


def actions_of(
    calibration_config: Mapping[str, Mapping[str, Any]] | Target, attachments: Sequence[Attachment]
) -> list[Callable[[], None]]:
    """What to do to load it; see ``Quantizer.load_calibration_config``, whose caller gets the warnings."""
    if isinstance(calibration_config, (str, os.PathLike)):
        calibration_config = load(calibration_config)
    if not isinstance(calibration_config, Mapping):
        kind = type(calibration_config).__name__
        raise TypeError(f"calibration_config must be a dict of layer name -> dict, or the path of one, got {kind}")
    problems: list[str] = []
    actions: list[Callable[[], None]] = []
    names = [attachment.name for attachment in attachments]
    _require_a_layer_of(calibration_config, names)
    for attachment in attachments:
        if attachment.name not in calibration_config:
            warnings.warn(f"calibration_config has no layer {attachment.name!r}", UserWarning, stacklevel=3)
        elif not isinstance(calibration_config[attachment.name], Mapping):
            problems.append(f"{attachment.name}: {calibration_config[attachment.name]!r} is no dict")
        else:
            actions += attachment.read_calibration(calibration_config[attachment.name], problems)
    for name in calibration_config:
        if name not in names:
            text = f"calibration_config has layer {name!r}, which is not quantized here{did_you_mean(name, names)}"
            warnings.warn(text, UserWarning, stacklevel=3)
    if problems:
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ValueError(f"calibration_config does not fit, nothing was loaded:{lines}")
    return actions


def _require_a_layer_of(calibration_config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a dict that has none of the quantized layers: it is another model's."""
    if any(name in calibration_config for name in names):
        return
    lines = "".join(f"\n  {name!r} is not quantized here{did_you_mean(name, names)}" for name in calibration_config)
    raise ValueError(
        "calibration_config is of another model: it has none of the quantized layers "
        f"{', '.join(map(repr, names))}. Nothing was loaded{':' + lines if lines else ', it is empty'}"
    )
