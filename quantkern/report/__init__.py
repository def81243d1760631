"""The report of a quantized model: a row a tensor, warnings, histograms."""

from quantkern.report.build import make_report
from quantkern.report.findings import MAX_SATURATION, MIN_SQNR
from quantkern.report.result import Finding, Report, Row

__all__ = ["MAX_SATURATION", "MIN_SQNR", "Finding", "Report", "Row", "make_report"]
