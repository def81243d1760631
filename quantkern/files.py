"""Files that appear whole or not at all, written beside their place and moved there, and that are checked when read."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

Target = str | os.PathLike[str]

UNFINISHED = ".quantkern-unfinished-"
"""How folders begin that hold what is being written. One that a killed process has left may be deleted."""


FOLDER = 0x10
"""The attribute of a folder in a zip file, covered by no checksum. For such a tensor torch.load returns memory that it
has not written to."""


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
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=target.parent)))
    except OSError as error:
        raise OSError(error.errno, f"cannot write {name} {target}: {error.strerror}; the model is unchanged") from error


def publish(folders: Mapping[str, Path], targets: Mapping[str, Path]) -> None:
    """Move what lies in the folders of ``stage`` to where it belongs: by the names that errors call them.

    One file takes its old one's place in one step. More than one (a model and its calibration, an ONNX model over 2 GB
    and its weights) must never lie beside files of another export: the old ones are set aside first, so a process that
    is killed in between leaves fewer files, and after an error all the old ones are back.
    """
    moves = [
        (name, file, targets[name].parent / file.name) for name, folder in folders.items() for file in folder.iterdir()
    ]
    aside: list[tuple[Path, Path]] = []
    moved: list[Path] = []
    try:
        for name, file, place in moves:
            with writing(name, targets[name]):
                with file.open("rb+") as written:
                    os.fsync(written.fileno())  # else a power failure may leave the new name with the contents missing
                if len(moves) > 1 and os.path.lexists(place):
                    old = file.parent / f"{file.name}.old"
                    place.replace(old)
                    aside.append((old, place))
        for name, file, place in moves:
            with writing(name, targets[name]):
                file.replace(place)
            moved.append(place)
    except BaseException:
        for place in moved:
            place.unlink()
        for old, place in aside:
            old.replace(place)
        raise


@contextmanager
def writing(name: str, target: Path) -> Iterator[None]:
    """Say which file cannot be written and why: torch turns a full disk into another error.

    Raises:
        OSError: in place of it and of a RuntimeError that it caused.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause.errno is None or not isinstance(error, (OSError, RuntimeError)):
            raise
        text = f"cannot write {name} {target}: {cause.strerror}; what was there before is unchanged"
        raise OSError(cause.errno, text) from error


def save(value: object, file: Path) -> None:
    """``torch.save``, always with the checksums that ``load`` compares, and with the cause where it fails."""
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with file.open("wb") as out:  # given a path, torch hides the cause
            torch.save(value, out)
    finally:
        torch.serialization.set_crc32_options(checked)


def load(path: Target) -> Any:
    """Read a file that ``export_model`` or ``torch.save`` wrote; a byte of its contents that has changed is an error.

    ``torch.load`` alone does not compare the checksums that ``torch.save`` writes: a flipped bit in a tensor becomes
    another number. Otherwise the same as ``torch.load(path, map_location="cpu", weights_only=True)``, which runs no
    code of the file.

    Args:
        path: a file of ``torch.save`` in its zip format, the default since torch 1.6, with the checksums that only
            ``torch.serialization.set_crc32_options(False)`` leaves out.

    Raises:
        ValueError: the file is damaged, cut off or none of ``torch.save``, or holds more than tensors, numbers, texts,
            lists and dicts. OSError: it is missing or cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"scale": torch.tensor([0.5])}, folder + "/calibration.pth")
    ...     load(folder + "/calibration.pth")
    {'scale': tensor([0.5000])}
    """
    with Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                folders = [entry.filename for entry in archive.infolist() if entry.external_attr & FOLDER]
                changed = archive.testzip()
        except Exception as error:  # zipfile's own, and whatever reading nonsense leads to
            text = f"{path} is cut off, damaged, or no file of torch.save; copy or export it again"
            raise ValueError(f"{text} ({error})") from error
        if folders or changed is not None:
            what = f"{folders[0]!r} in it is a folder" if folders else f"{changed!r} in it does not match its checksum"
            raise ValueError(f"{path} is damaged: {what}; copy or export it again")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no type of its own for files that it cannot read
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path} cannot be read by torch.load(weights_only=True): {reason}") from error


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
        with writing(name, target):
            yield folder / target.name
        publish({name: folder}, {name: target})
