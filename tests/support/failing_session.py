"""A session of ONNX Runtime that fails in some runs, as where memory runs out."""

from typing import Any

from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from logratio.serving import Reranker

MOST_TOKENS = 256
"""Longest candidate of a run that does not fail."""


class FailingSession:
    """Run the graph of another session, unless a candidate has too many tokens.

    Attributes:
        calls: Number of runs, with those that failed.
    """

    def __init__(self, session: Any) -> None:
        self.session, self.calls = session, 0

    def get_providers(self) -> Any:
        return self.session.get_providers()

    def run(self, names: Any, feed: Any, options: Any) -> Any:
        self.calls += 1
        if feed["candidate_ids"].shape[-1] > MOST_TOKENS:
            raise RuntimeException("Failed to allocate memory\nat a node")
        return self.session.run(names, feed, options)


def failing(reranker: Reranker) -> tuple[Reranker, FailingSession]:
    """A reranker with the bundle of another, and its session, which fails for long candidates."""
    session = FailingSession(reranker._session)
    other = Reranker(session, reranker.manifest, reranker.encoder, reranker._token_budget)
    other.digest = reranker.digest
    return other, session
