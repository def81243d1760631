"""pip's build backend: setuptools, building against the torch that is already installed.

pip builds in an isolated environment, where torch would have to be downloaded anew and could be another version than
the one the extension will be imported beside. This backend puts the installing interpreter's own packages behind the
isolated ones, and asks pip for torch only where there is none.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

_SITE = sysconfig.get_path("platlib")
if (Path(_SITE) / "torch").is_dir() and _SITE not in sys.path:
    sys.path.append(_SITE)


def _needed(config_settings: Any = None) -> list[str]:
    """What pip must install first. setup.py imports torch, so it is not run to find out."""
    return [] if importlib.util.find_spec("torch") else ["torch>=2.11"]


get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = _needed
