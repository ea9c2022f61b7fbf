"""A plan to batches: which groups go through the model together, update by update."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from logratio._rust import PaddedLayout, Plan, SharedLayout, Store

LayoutName = Literal["shared", "padded"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One pass through the model.

    Attributes:
        layout: Ids, positions and what is scored, in numpy.
        update: The optimizer step that it belongs to, from 0.
        index: Its number in that update, from 0.
        count: Micro-batches of that update.
    """

    layout: SharedLayout | PaddedLayout
    update: int
    index: int
    count: int

    @property
    def ends_update(self) -> bool:
        """Whether the optimizer steps after this one."""
        return self.index == self.count - 1


def micro_batches(
    store: Store, plan: Plan, layout: LayoutName = "shared", *, first_update: int = 0
) -> Iterator[MicroBatch]:
    """Lay out a plan's micro-batches one by one, as they are asked for.

    Args:
        store: What the plan was made for.
        plan: This rank's share of an epoch.
        layout: ``shared`` runs each prompt once, ``padded`` once a completion.
        first_update: Where to go on after an interruption.
    """
    lay_out = store.shared_layout if layout == "shared" else store.padded_layout
    updates = len(plan.update_offsets) - 1
    for update in range(first_update, updates):
        first, end = plan.update_offsets[update : update + 2].tolist()
        for micro in range(first, end):
            start, stop = plan.micro_offsets[micro : micro + 2].tolist()
            groups = plan.order[start:stop]
            yield MicroBatch(lay_out(groups), update, micro - first, end - first)
