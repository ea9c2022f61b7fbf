"""What a sealed store says about its data, computed from its columns."""

from logratio.data.analysis.report import Analysis, analyse

__all__ = ["Analysis", "analyse"]
