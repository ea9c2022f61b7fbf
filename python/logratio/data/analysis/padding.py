"""What padding would compute for nothing, and what sharing the prompt saves."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio.data.analysis.columns import Columns

BATCH = 8
"""Groups in the batches that are imagined."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Tokens computed by rows of prompt and completion, and by sharing the prompt.

    Attributes:
        rows: Tokens of all rows, one a completion, its prompt in each: what is there to compute.
        prompts: Of these, tokens of prompts.
        shared: Tokens where each prompt stands once: what the shared layout computes.
        in_order: Tokens of padded batches of 8 groups in the order of the store; every row of a
            batch is as long as its longest.
        in_length_order: The same, groups sorted by their longest row.
    """

    rows: int
    prompts: int
    shared: int
    in_order: int
    in_length_order: int

    @property
    def prompt_share(self) -> float:
        """Share of the rows' tokens that are prompt."""
        return self.prompts / self.rows

    @property
    def saved(self) -> float:
        """Share of the rows' tokens that sharing the prompt does not compute."""
        return 1 - self.shared / self.rows

    @property
    def waste(self) -> float:
        """Share of padding in batches in the order of the store."""
        return 1 - self.rows / self.in_order

    @property
    def sorted_waste(self) -> float:
        """Share of padding in batches sorted by length."""
        return 1 - self.rows / self.in_length_order

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        shares = ("prompt_share", "saved", "waste", "sorted_waste")
        return asdict(self) | {name: getattr(self, name) for name in shares}


def padding(columns: Columns) -> Padding | None:
    """Count what layouts compute; None for an empty store."""
    if not columns.groups:
        return None
    sizes, longest = columns.sizes, columns.longest()
    prompts = int(sizes @ columns.prompts.astype(np.int64))
    answers = int(columns.completions.sum(dtype=np.int64))
    in_order = _padded(longest, sizes)
    if (sizes == sizes[0]).all():
        longest.sort()
    else:
        order = np.argsort(longest, kind="stable")
        longest, sizes = longest[order], sizes[order]
    return Padding(
        rows=prompts + answers,
        prompts=prompts,
        shared=int(columns.prompts.sum(dtype=np.int64)) + answers,
        in_order=in_order,
        in_length_order=_padded(longest, sizes),
    )


def _padded(longest: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
    """Count the tokens of batches of consecutive groups, whose rows are as long as the longest."""
    starts = np.arange(0, len(longest), BATCH)
    widest, rows = np.maximum.reduceat(longest, starts), np.add.reduceat(sizes, starts)
    return int(widest @ rows)
