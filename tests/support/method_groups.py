"""Stores of random groups for every kind of data that a method trains on."""

import numpy as np

from logratio._rust import ROLES, Store, StoreWriter
from logratio.training.methods.table import DataKind

_ROLES: dict[DataKind, list[list[str]]] = {
    "pairs": [["chosen", "rejected"]],
    "labelled answers": [["chosen", "mismatched"], ["rejected", "mismatched"]],
    "lists": [["candidate"] * 2, ["candidate"] * 3, ["candidate"] * 5],
    "demonstrations": [["demonstration"]],
}


def store_for(data: DataKind, groups: int = 8, seed: int = 0, weight: bool = False) -> Store:
    """Make groups of ragged random tokens, with margins and scores where the data has them."""
    random, writer = np.random.default_rng(seed), StoreWriter()
    for line in range(groups):
        roles = _ROLES[data][line % len(_ROLES[data])]
        lengths = random.integers(1, 14, len(roles)).astype(np.uint32)
        total = int(lengths.sum())
        values = np.full((len(roles), 4), np.nan, np.float32)
        if data == "lists":
            values[:, 0] = random.permutation(len(roles)).astype(np.float32) / 2
        if data == "pairs":
            values[0, 2] = random.uniform(0.5, 3)
        if weight:
            values[:, 3] = random.uniform(0, 2)
        writer.push(
            random.integers(3, 200, int(random.integers(1, 20))).astype(np.int32),
            random.integers(3, 200, total).astype(np.int32),
            (random.random(total) < 0.9).astype(np.uint8) | _last(lengths),
            lengths,
            np.array([ROLES.index(role) for role in roles], np.uint8),
            0,
            line,
            values,
        )
    return writer.finish()


def _last(lengths: np.ndarray) -> np.ndarray:
    """Mark the last token of each completion, which always counts."""
    marks = np.zeros(int(lengths.sum()), np.uint8)
    marks[np.cumsum(lengths) - 1] = 1
    return marks
