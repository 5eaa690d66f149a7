"""Write ``report.html``, a page about a run that needs no scripts, no network and no other files."""

from nnunetv2_macl.report.page import FILE, write_report, write_report_after_run

__all__ = ["FILE", "write_report", "write_report_after_run"]
