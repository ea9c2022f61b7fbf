"""Rank completions with a bundle's implicit reward: in Python, over files, or over HTTP.

Imports numpy, tokenizers and jinja2; ONNX Runtime when a bundle is loaded; fastapi and uvicorn
when it is served. Never imports torch or transformers.
"""

from logratio.bundle import BundleError
from logratio.serving.bundle_evaluation import bundle_pairs, evaluate_bundle
from logratio.serving.rank_file import RankSummary, rank_file, rank_forecast
from logratio.serving.reranker import NoCandidateError, Reranker, Score
from logratio.serving.session import ProviderError

__all__ = [
    "BundleError",
    "NoCandidateError",
    "ProviderError",
    "RankSummary",
    "Reranker",
    "Score",
    "bundle_pairs",
    "evaluate_bundle",
    "rank_file",
    "rank_forecast",
]
