"""Readings of small files, and what became of each row."""

from typing import Any

from logratio.data import DataReport

Row = dict[str, Any]


def pair(number: int, **changed: Any) -> Row:
    """Return one of many different sound rows."""
    row = {"prompt": "the cat sat", "chosen": " good" * (number + 1), "rejected": " bad"}
    return {key: value for key, value in (row | changed).items() if value is not ...}


def account(report: DataReport) -> tuple[int, int, int, int]:
    return report.read, report.kept, report.refused, report.deduplicated
