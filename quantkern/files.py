"""Files that appear whole or not at all: they are written beside their place and then moved there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

Target = str | os.PathLike[str]


def target_of(name: str, path: Target | None) -> Path:
    """The absolute path of a file to write; ``name`` is what errors call it.

    Raises:
        TypeError: no path. IsADirectoryError: the path of a folder.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"{name} must be a path, got {path!r}")
    target = Path(path).absolute()
    if target.is_dir():
        raise IsADirectoryError(f"{name} is the folder {target}, expected a file")
    return target


def stage(stack: ExitStack, name: str, target: Path) -> Path:
    """A temporary folder beside the target, so that the finished file is moved and never seen half-written.

    Raises:
        OSError: the target's folder is missing or cannot be written.
    """
    try:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".quantkern-", dir=target.parent)))
    except OSError as error:
        raise OSError(error.errno, f"cannot write {name} {target}: {error.strerror}; the model is unchanged") from error


def publish(folder: Path, target: Path) -> None:
    """Move what lies in a folder of ``stage`` to where it belongs: more than one file for an ONNX model over 2 GB."""
    for file in folder.iterdir():
        file.replace(target.parent / file.name)


@contextmanager
def replaced(name: str, path: Target) -> Iterator[Path]:
    """A path to write one file to, which takes the place of ``path`` when the block ends without an error.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replaced("path", folder + "/note.txt") as file:
    ...         _ = file.write_text("whole")
    ...     print(Path(folder, "note.txt").read_text())
    whole
    """
    target = target_of(name, path)
    with ExitStack() as stack:
        folder = stage(stack, name, target)
        yield folder / target.name
        publish(folder, target)
