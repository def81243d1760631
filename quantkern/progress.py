"""One progress bar: tqdm's where it is installed, else a plain one; lines where no one watches."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """Counts steps to ``total``. On a terminal a bar; in a file or a pipe a line every tenth of the way.

    total None: not known. There is a count then instead of a bar, and no lines.

    >>> import io
    >>> stream = io.StringIO()
    >>> with Progress(2, stream) as progress:
    ...     progress.describe("calibration")
    ...     progress.advance()
    >>> stream.getvalue().split()[-1]
    'calibration'
    """

    def __init__(self, total: int | None, stream: TextIO | None = None) -> None:
        self.total, self.done, self.text = None if total is None else max(total, 1), 0, ""
        self.stream = stream or sys.stderr
        self.started = self.shown = time.monotonic()
        self.tenths = 0
        self.terminal = self.stream.isatty()
        self.tqdm: Any = None
        if self.terminal:
            try:
                from tqdm import tqdm  # type: ignore[import-untyped]
            except ImportError:
                pass
            else:
                self.tqdm = tqdm(total=self.total, file=self.stream, leave=False, unit="step")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.tqdm is not None:
            self.tqdm.close()
        elif self.terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def describe(self, text: str) -> None:
        """What is being done now."""
        self.text = text
        if self.tqdm is not None:
            self.tqdm.set_description(text)

    def advance(self) -> None:
        """One step is done."""
        self.done += 1
        if self.tqdm is not None:
            self.tqdm.update(1)
        elif self.terminal:
            self._bar()
        elif self.total is not None and self.done * 10 // self.total > self.tenths:
            self.tenths = self.done * 10 // self.total
            self.stream.write(f"{self.tenths * 10:4d}%  {self._left(self.total):4.0f} s left  {self.text}\n")
            self.stream.flush()

    def _left(self, total: int) -> float:
        return (time.monotonic() - self.started) * (total - self.done) / self.done

    def _bar(self) -> None:
        now = time.monotonic()
        if now - self.shown < 0.1 and self.done != self.total:
            return
        self.shown = now
        if self.total is None:
            self.stream.write(f"\r\x1b[K{self.done} steps, {now - self.started:.0f} s  {self.text}")
            self.stream.flush()
            return
        filled = 30 * self.done // self.total
        bar = "#" * filled + "." * (30 - filled)
        self.stream.write(
            f"\r\x1b[K[{bar}] {100 * self.done // self.total}%  {self._left(self.total):.0f} s left  {self.text}"
        )
        self.stream.flush()
