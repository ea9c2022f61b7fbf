"""The log-prob engine: `log π(completion | prompt)` of a model over a batch, and nothing else."""

from logratio.logps.checks import UnsupportedModelError
from logratio.logps.completion import completion_logps, score

__all__ = [
    "UnsupportedModelError",
    "completion_logps",
    "score",
]
