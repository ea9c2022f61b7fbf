"""Exports that reuse the trace of another model of the same architecture.

An export itself traces policy and reference once if they differ only in their weights, because the
weights are inputs of a trace. Here it holds for all exports of a session: what follows the trace,
the comparison with torch among it, is done for each. Tests of tracing do without.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest

from logratio.export import graph
from logratio.export.reward_model import ScoreScorer
from logratio.export.scorer import HalfScorer

_traces: list[tuple[int, HalfScorer, Any]] = []


@contextmanager
def shared_traces() -> Iterator[None]:
    """Trace each architecture once a session, inside."""
    trace_half = graph._trace_half

    def trace_or_copy(scorer: HalfScorer | ScoreScorer, opset: int) -> Any:
        if not isinstance(scorer, HalfScorer) or isinstance(scorer.model, peft.PeftModel):
            return trace_half(scorer, opset)
        for known_opset, known, traced in _traces:
            if known_opset == opset and graph.same_architecture(known, scorer):
                return traced.clone()  # what follows changes it
        traced = trace_half(scorer, opset)
        _traces.append((opset, scorer, traced))
        return traced.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_trace_half", trace_or_copy)
        yield
