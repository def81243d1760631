"""The progress bar of the examples is quantkern's own."""

from quantkern.progress import Progress

__all__ = ["Progress"]
