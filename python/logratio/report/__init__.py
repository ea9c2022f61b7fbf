"""The HTML report of a run, from the files in its output folder; no torch."""

from logratio.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
