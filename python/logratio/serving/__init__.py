"""Rank completions with a bundle's implicit reward: in Python, over files, or over HTTP.

Imports numpy, tokenizers and jinja2; ONNX Runtime when a bundle is loaded; fastapi and uvicorn
when it is served. Never imports torch or transformers.
"""

from logratio.bundle import BundleError
from logratio.serving.bundle_evaluation import bundle_pairs, evaluate_bundle
from logratio.serving.graph_tensors import GraphTensors
from logratio.serving.rank_file import rank_file, rank_forecast
from logratio.serving.rank_ray import RankBatch
from logratio.serving.rank_rows import RankSummary
from logratio.serving.rank_workers import Workers
from logratio.serving.reranker import GraphRunError, NoCandidateError, Reranker
from logratio.serving.reward_function import RewardFunction
from logratio.serving.scores import Score
from logratio.serving.session import ProviderError
from logratio.serving.shared_base import SharedBase

__all__ = [
    "BundleError",
    "GraphRunError",
    "GraphTensors",
    "NoCandidateError",
    "ProviderError",
    "RankBatch",
    "RankSummary",
    "Reranker",
    "RewardFunction",
    "Score",
    "SharedBase",
    "Workers",
    "bundle_pairs",
    "evaluate_bundle",
    "rank_file",
    "rank_forecast",
]
