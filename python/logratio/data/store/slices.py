"""Slices of a store that are rewritten group by group, and the parts of their layout."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from logratio._rust import SharedLayout, Store

SLICE_TOKENS = 1 << 20
"""Tokens of the groups that are in memory at a time."""

SLICE_FIELDS = (
    *("input_ids", "target_ids", "completion_mask", "completion_offsets"),
    *("prompt_lengths", "completion_lengths", "group_sizes", "roles", "completions"),
)
"""Fields of a layout that hold the whole content of its groups."""


def slices(store: Store) -> Iterator[tuple[int, int]]:
    """Yield the bounds of slices of about `SLICE_TOKENS` tokens."""
    ends = np.cumsum(store.shared_lengths(), dtype=np.int64)
    first = 0
    while first < len(ends):
        done = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, done + SLICE_TOKENS, "right")))
        yield first, stop
        first = stop


def prompt_ids(layout: SharedLayout) -> NDArray[np.int32]:
    """Extract the concatenated prompts of groups."""
    answers = np.add.reduceat(layout.completion_lengths, firsts(layout))
    is_answer = alternating(layout.prompt_lengths, answers)
    return layout.input_ids.ravel()[~is_answer].astype(np.int32)


def firsts(layout: SharedLayout) -> NDArray[np.int64]:
    """Return the place of each group's first completion in the layout."""
    return np.cumsum(layout.group_sizes) - layout.group_sizes


def alternating(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return where parts of the second kind are, if parts of both kinds and lengths alternate."""
    lengths = np.column_stack((one, other)).ravel()
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
