"""Compute the log-probs of completions, `log π(completion | prompt)`, of a model over a batch."""

from logratio.logps.checks import UnsupportedModelError
from logratio.logps.completion import completion_logps, completion_loss, score

__all__ = [
    "UnsupportedModelError",
    "completion_logps",
    "completion_loss",
    "score",
]
