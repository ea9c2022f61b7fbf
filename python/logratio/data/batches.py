"""A plan to batches: which groups go through the model together, and their arrays."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from logratio._rust import PaddedLayout, Plan, SharedLayout, Store, TreeLayout
from logratio.errors import ConfigError

Buffer = NDArray[np.uint8] | Callable[[int], NDArray[np.uint8]]
"""A buffer to fill, uint8, or what makes one of the bytes it is called with."""


def micro_batches(plan: Plan, update: int | None = None) -> list[NDArray[np.int64]]:
    """Return the group numbers of each micro-batch, as views into the plan.

    Args:
        plan: This rank's share of an epoch.
        update: Of which optimizer step, from 0; None: of all.
    """
    offsets = plan.micro_offsets
    if update is not None:
        first, last = plan.update_offsets[update : update + 2]
        offsets = offsets[first : last + 1]
    return [plan.order[start:stop] for start, stop in pairwise(offsets.tolist())]


def lay_out(
    store: Store,
    groups: NDArray[np.int64],
    layout: str = "shared",
    *,
    arena: Buffer | None = None,
    fields: Sequence[str] | None = None,
    side: str = "right",
    multiple_of: int = 1,
    width: int | None = None,
    pad_id: int = 0,
) -> SharedLayout | TreeLayout | PaddedLayout:
    """Lay out `groups`, all arrays in one buffer.

    Args:
        store: where the groups are.
        groups: int64 `[G]`, their numbers.
        layout: "shared" (one row of `T` tokens, each prompt once), "tree" (likewise, what groups
            begin with alike once) or "padded" (`[N, T]`).
        arena: the buffer to fill, or what makes it; None: a fresh one.
        fields: the arrays to lay out; None: those that training reads. See `rust/layout/field.rs`.
        side: where the padding of the padded layout is, "left" or "right".
        multiple_of: `T` is rounded up to a multiple of this.
        width: `T` is this (rounded up likewise) whatever the groups need.
        pad_id: the token id in padding.

    Raises:
        ValueError: an argument is none of these, or the groups do not fit in `width` or `arena`.
        IndexError: there is no such group.
    """
    if layout in ("shared", "tree"):
        lay = store.shared_layout if layout == "shared" else store.tree_layout
        return lay(
            groups,
            arena=arena,
            fields=fields,
            multiple_of=multiple_of,
            width=width,
            pad_id=pad_id,
        )
    if layout != "padded":
        raise ConfigError(f"layout must be shared, tree or padded, not {layout!r}")
    return store.padded_layout(
        groups,
        arena=arena,
        fields=fields,
        side=side,
        multiple_of=multiple_of,
        width=width,
        pad_id=pad_id,
    )
