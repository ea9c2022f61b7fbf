"""How many tokens are computed at a time: given, or found by trying."""

from pathlib import Path

import numpy as np
import torch

from logratio._rust import Store
from logratio.errors import LogratioError
from logratio.training import demand
from logratio.training.models import AT_ONCE

FIRST = 2**12
"""What a GPU begins with: there is room for it beside any model that fits; the rest is found."""
CEILING = {"cpu": AT_ONCE["cpu"], "cuda": 2**18}
"""Where larger stops paying. On a CPU the caches are full: two small models were fastest from 1,024
to 4,096 tokens, and a fifth slower at 16,384."""
MEMORY_SHARE = 0.5
"""Of the memory that is free, what activations may take on a CPU: a forecast is no promise."""
PHRASES = ("out of memory", "can't allocate memory", "not enough memory")
"""How torch says so where the error's type does not."""


class MemoryShortageError(LogratioError, RuntimeError):
    """Not even one group fits in memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an error that a smaller batch may avoid from every other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in PHRASES)


class TokenBudget:
    """The largest batch that is believed to fit; it learns from every batch.

    Attributes:
        tokens: computed at a time.
        ceiling: never more than this.
    """

    def __init__(self, tokens: int, ceiling: int | None = None) -> None:
        self.tokens, self.ceiling = tokens, ceiling or tokens

    def fitted(self, tokens: int) -> None:
        """Note that a batch fitted; try twice as many once the budget itself was tried."""
        if 2 * tokens > self.tokens:
            self.tokens = min(2 * self.tokens, self.ceiling)

    def exceeded(self, tokens: int) -> None:
        """Note that a batch did not fit: from now on half of it."""
        self.tokens = self.ceiling = max(1, min(tokens, self.tokens) // 2)


def token_budget(given: int | None, model: str | Path, device: torch.device) -> TokenBudget:
    """Return `given`, or where to begin to look: low on a GPU, and what is free on a CPU."""
    if given is not None:
        return TokenBudget(given)
    ceiling = CEILING.get(device.type, CEILING["cpu"])
    if device.type == "cuda":
        return TokenBudget(FIRST, ceiling)
    fits = int(MEMORY_SHARE * demand.free_bytes() / demand.position_bytes(model))
    return TokenBudget(max(1, min(ceiling, fits)))


TREE_AT_ONCE = 2**14
"""Groups of which the first are tried for the next micro-batch of a tree."""


class GroupQueue:
    """Groups that wait to be scored, the longest first: what does not fit shows at once.

    In the tree layout those that share a beginning are neighbours, and short ones may come first.

    Attributes:
        groups: int64, in the order in which they are scored.
        position: how many of them were taken.
    """

    def __init__(self, store: Store, groups: np.ndarray, layout: str) -> None:
        """Queue `groups`, int64, for micro-batches in `layout`."""
        self.position, self._store, self._layout = 0, store, layout
        if layout == "tree":
            self.groups = store.tree_order(groups)
            return
        lengths = store.shared_lengths() if layout == "shared" else _padded_widths(store)
        lengths = lengths[groups].astype(np.int64)
        order = np.argsort(-lengths, kind="stable")
        self.groups, self._widths = groups[order], lengths[order]
        sizes = np.diff(store.completion_offsets())[self.groups]
        self._ends = np.cumsum(self._widths if layout == "shared" else sizes)

    def __len__(self) -> int:
        return len(self.groups) - self.position

    def take(self, budget: int) -> np.ndarray:
        """Return the next groups that have `budget` tokens together, and one at least."""
        start = self.position
        if self._layout == "tree":
            waiting = self.groups[start : start + TREE_AT_ONCE]
            self.position += self._store.tree_fit(waiting, budget)
            return self.groups[start : self.position]
        before = self._ends[start - 1] if start else 0
        # The first row is the widest, and all rows are padded to it.
        room = budget if self._layout == "shared" else budget // self._widths[start]
        stop = int(np.searchsorted(self._ends, before + room, side="right"))
        self.position = max(start + 1, stop)
        return self.groups[start : self.position]


def _padded_widths(store: Store) -> np.ndarray:
    """Return the tokens of each group's longest row."""
    offsets = store.completion_offsets()
    longest = np.maximum.reduceat(store.completion_lengths(), offsets[:-1])
    widths: np.ndarray = store.prompt_lengths() + longest
    return widths
