"""Exports that reuse the trace of another model of the same architecture.

An export itself traces policy and reference once if they differ only in their weights, because the
weights are inputs of a trace. Here it holds for all exports of a session: what follows the trace,
the comparison with torch among it, is done for each. Tests of tracing do without.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest

from logratio.export import graph
from logratio.export.reward_model import ScoreScorer
from logratio.export.scorer import HalfScorer
from logratio.logps.completion import transformer
from logratio.training.fingerprint import IGNORED_CONFIG

_traces: dict[str, Any] = {}


@contextmanager
def shared_traces() -> Iterator[None]:
    """Trace each architecture once a session, inside."""
    trace_half = graph._trace_half

    def trace_or_copy(scorer: HalfScorer | ScoreScorer, opset: int) -> Any:
        if not isinstance(scorer, HalfScorer) or isinstance(scorer.model, peft.PeftModel):
            return trace_half(scorer, opset)
        key = f"opset {opset}: {architecture(scorer)}"
        if key not in _traces:
            _traces[key] = trace_half(scorer, opset)
        return _traces[key].clone()  # what follows changes it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_trace_half", trace_or_copy)
        yield


def architecture(scorer: HalfScorer) -> str:
    """All of a model but the values of its weights."""
    config = transformer(scorer.model).config.to_dict()
    settings = {name: value for name, value in config.items() if name not in IGNORED_CONFIG}
    weights = {
        name: (str(weight.dtype), tuple(weight.shape))
        for name, weight in scorer.state_dict().items()
    }
    modules = [type(module).__name__ for module in scorer.modules()]
    return json.dumps([settings, weights, modules], default=str, sort_keys=True)
