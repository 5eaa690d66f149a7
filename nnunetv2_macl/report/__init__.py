"""A run as one page to read and to pass on: ``report.html``, without scripts, network or files beside it."""

from nnunetv2_macl.report.page import FILE, write_report, write_report_after_run

__all__ = ["FILE", "write_report", "write_report_after_run"]
