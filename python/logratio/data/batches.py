"""A plan to batches: which groups go through the model together."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Plan


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
