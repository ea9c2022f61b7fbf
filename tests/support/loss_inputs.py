"""Groups of completions for tests of losses, and losses by the name of their method."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logratio.training.config import TrainConfig
from logratio.training.methods.logps import CHOSEN, MISMATCHED, REJECTED, GroupLogps
from logratio.training.methods.method import DataKind
from logratio.training.methods.objective import ALONE, Objective
from logratio.training.methods.table import METHODS

NAN = float("nan")


class Answer(NamedTuple):
    """A completion: summed log-probs under policy and reference, counted tokens, and its values.

    `confidence` is the mean of log π(token) - log Σ π², `divergence` the summed KL divergence from
    the reference.
    """

    policy: float
    reference: float
    length: int = 1
    role: int = CHOSEN
    score: float = NAN
    rank: float = NAN
    margin: float = NAN
    confidence: float = NAN
    divergence: float = NAN

    @property
    def logratio(self) -> float:
        return self.policy - self.reference


def groups_of(*groups: Sequence[Answer]) -> GroupLogps:
    """Return the inputs of a loss for some groups."""
    every = [answer for group in groups for answer in group]
    columns = {
        name: torch.tensor([getattr(one, name) for one in every], dtype=torch.float64)
        for name in ("policy", "reference", "length", "confidence", "divergence")
    }
    known = {name: column for name, column in columns.items() if not column.isnan().any()}
    return GroupLogps(
        columns["policy"],
        columns["reference"],
        columns["length"],
        torch.tensor([one.role for one in every], dtype=torch.uint8),
        np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64),
        np.array([[a.score, a.rank, a.margin, NAN] for a in every], np.float32).reshape(-1, 4),
        confidences=known.get("confidence"),
        divergences=known.get("divergence"),
    )


def pair(chosen: Answer, rejected: Answer, margin: float = NAN) -> list[Answer]:
    """Return a pair; the data prefers the chosen completion by `margin`."""
    return [
        chosen._replace(role=CHOSEN, margin=margin),
        rejected._replace(role=REJECTED, margin=margin),
    ]


def good(answer: Answer, mismatched: Answer | None = None) -> list[Answer]:
    """Return a good answer, and perhaps a completion of another prompt."""
    return _labelled(answer, CHOSEN, mismatched)


def bad(answer: Answer, mismatched: Answer | None = None) -> list[Answer]:
    """Return a bad answer, and perhaps a completion of another prompt."""
    return _labelled(answer, REJECTED, mismatched)


def _labelled(answer: Answer, role: int, mismatched: Answer | None) -> list[Answer]:
    other = [] if mismatched is None else [mismatched._replace(role=MISMATCHED)]
    return [answer._replace(role=role), *other]


def objective_of(name: str, beta: float | None = None, **options: float) -> Objective:
    """Return the objective of a run with one method."""
    alone = {key: value for key, value in options.items() if key in ALONE}
    others = {key: value for key, value in options.items() if key not in ALONE}
    return Objective.of(
        TrainConfig("model", "data", "out", loss=name, beta=beta, loss_options=others, **alone)  # type: ignore[arg-type]
    )


def with_statistics(objective: Objective, groups: GroupLogps) -> GroupLogps:
    """Return the groups of one update with the statistics of the update."""
    if not objective.needs_statistics:
        return groups
    found: Mapping[str, Tensor] = objective.statistics(groups.on_host(), trains=True)
    return replace(groups, statistics=found)


def losses_of(name: str, groups: GroupLogps, beta: float | None = None, **options: float) -> Tensor:
    """Return the losses of the groups of one update, the first of its run: `[B]`."""
    objective = objective_of(name, beta, **options)
    return objective.losses(with_statistics(objective, groups))


def methods_of(*kinds: DataKind) -> list[str]:
    """Return the names of the methods that train on these kinds of data."""
    return [name for name, method in METHODS.items() if method.data in kinds]
