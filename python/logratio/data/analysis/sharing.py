"""What computing shared beginnings once would save: in groups, in updates, in all of the data."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logratio._rust import Store

UPDATE = 32
"""Groups of an update, as `train` has them by default."""

BUDGET = 2048
"""Tokens of a micro-batch, likewise on a CPU."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Tokens computed where each beginning that sequences share is computed once.

    A sequence is a prompt with one of its completions. Groups share where their prompts agree in
    their first 8 tokens. All numbers are exact counts of distinct beginnings.

    Attributes:
        grouped: Each prompt once a group: what is computed without `--share-beginnings`.
        alone: What the sequences of a group begin with alike once, groups apart.
        micro_batches: Groups of an update that begin alike in one micro-batch: what
            `train --share-beginnings` computes with updates of 32 groups of similar length (epoch
            0, seed 0) and micro-batches of 2,048 tokens.
        updates: The least for these updates, whatever the micro-batches.
        one_pass: What `precompute --share-beginnings` computes in micro-batches of 2,048 tokens.
        whole: The least for the data: all of it as one tree.
    """

    grouped: int
    alone: int
    micro_batches: int
    updates: int
    one_pass: int
    whole: int

    def saved(self, name: str) -> float:
        """Return which share of the grouped tokens one of the other counts saves."""
        tokens: int = getattr(self, name)
        return 1 - tokens / self.grouped

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        names = ("alone", "micro_batches", "updates", "one_pass", "whole")
        return asdict(self) | {f"saved_{name}": self.saved(name) for name in names}


def sharing(store: Store) -> Sharing | None:
    """Count what sharing beginnings saves; None for an empty store.

    Takes about 100 bytes a completion, and 10 to 20 seconds of one core a million pairs.
    """
    if not len(store):
        return None
    groups = np.arange(len(store))
    in_order = store.tree_order(groups)
    plan = store.plan(
        order="length_grouped", groups_per_update=UPDATE, token_budget=BUDGET, layout="tree"
    )
    updates = plan.micro_offsets[plan.update_offsets]

    def tokens(order: np.ndarray, offsets: np.ndarray) -> int:
        return int(store.tree_tokens(order, offsets).sum())

    return Sharing(
        grouped=store.tokens,
        alone=tokens(groups, np.arange(len(store) + 1)),
        micro_batches=tokens(plan.order, plan.micro_offsets),
        updates=tokens(plan.order, updates),
        one_pass=tokens(in_order, store.tree_cuts(in_order, BUDGET)),
        whole=tokens(in_order, np.array([0, len(store)])),
    )
