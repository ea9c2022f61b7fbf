"""Use a bundle: best-of-N by its implicit reward, in a process, over files, over HTTP.

Loads numpy, tokenizers and jinja2; ONNX Runtime when a bundle is loaded, fastapi and uvicorn when
it is served; never torch, never transformers.
"""

from logratio.serving.rank_file import RankSummary as RankSummary
from logratio.serving.rank_file import rank_file as rank_file
from logratio.serving.rank_file import rank_forecast as rank_forecast
from logratio.serving.reranker import Reranker as Reranker
from logratio.serving.reranker import Score as Score
