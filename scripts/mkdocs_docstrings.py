"""A griffe extension: mkdocstrings reads docstrings with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.append(str(Path(__file__).resolve().parent))

from mkdocs_hooks import as_markdown  # noqa: E402


class DocstringMarkdown(griffe.Extension):
    """Rewrites every docstring when it has been read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """griffe calls this for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
