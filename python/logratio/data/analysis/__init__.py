"""Analyse the data of a sealed store from its columns."""

from logratio.data.analysis.report import Analysis, analyse

__all__ = ["Analysis", "analyse"]
