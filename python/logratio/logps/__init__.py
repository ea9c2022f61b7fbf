"""The log-prob engine: `log π(completion | prompt)` of a model over a batch, and nothing else."""

from logratio.logps.completion import completion_logps as completion_logps
from logratio.logps.completion import score as score
