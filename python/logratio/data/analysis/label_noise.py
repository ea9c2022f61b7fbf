"""How many labels are flipped, as far as repeated judgements can tell."""

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio.data.analysis.statistics import Interval, wilson

NOTABLE_FLIPS = 0.05
"""There is a warning where the whole interval of the flip rate lies above this."""


@dataclass(frozen=True, slots=True)
class FlipEstimate:
    """The estimated share of judgements that say the opposite of the truth.

    Two judgements of one pair disagree with probability 2ε(1 − ε), if each is flipped with
    probability ε, independently of the other and whatever the pair. Then ε(1 − ε) is the variance
    of the judgements within a pair, pooled over all pairs that were judged more than once.

    It is a lower bound rather than a middle where the assumptions fail: rows that were copied, not
    judged again, agree by themselves; and where some pairs are harder than others, the root of the
    mean variance is below the mean of ε. Errors that all judges share are not seen at all.

    Attributes:
        rate: ε, from 0 to 0.5 (0.5: judgements are tosses of a coin).
        interval: 95 %: Wilson's for the disagreement, carried over; conservative.
        disagreement: Estimated probability that two judgements of one pair disagree.
        judgements: Of the pairs below.
        pairs: Pairs that were judged more than once.
        contested: Of these, pairs with judgements both ways.
    """

    rate: float
    interval: Interval
    disagreement: float
    judgements: int
    pairs: int
    contested: int

    @property
    def is_notable(self) -> bool:
        """Whether there is reason to warn."""
        return self.interval[0] > NOTABLE_FLIPS

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def estimate_flips(votes: NDArray[Any]) -> FlipEstimate | None:
    """Estimate the flip rate from how often each pair was judged either way.

    Args:
        votes: Judgements for one completion and for the other, a row a pair: whole numbers [R, 2].
            Rows with less than two judgements are passed over.

    Returns:
        None where no pair was judged more than once.
    """
    votes = votes.astype(np.float64).reshape(-1, 2)
    votes = votes[votes.sum(axis=1) > 1]
    if not len(votes):
        return None
    judged = votes.sum(axis=1)
    freedom = judged - 1
    within = float((votes[:, 0] * votes[:, 1] / judged).sum() / freedom.sum())
    disagreement = min(2 * within, 1.0)
    # A pair with many judgements weighs more: Kish's count of equally weighted pairs.
    effective = float(freedom.sum() ** 2 / (freedom**2).sum())
    low, high = wilson(disagreement, effective)
    return FlipEstimate(
        _flip_rate(disagreement),
        (_flip_rate(low), _flip_rate(high)),
        disagreement,
        int(judged.sum()),
        len(votes),
        int((votes.min(axis=1) > 0).sum()),
    )


def votes_of(repeated: int, contradicted: int) -> NDArray[np.int64]:
    """Take rows that repeat a pair, and rows that contradict one, for judgements of it: [R, 2].

    Each repeat is taken for a pair judged twice alike, each contradiction for a pair judged once
    each way. That is exact where no pair stands more than twice in the data.
    """
    return np.repeat(np.array([[2, 0], [1, 1]]), [repeated, contradicted], axis=0)


def _flip_rate(disagreement: float) -> float:
    """Solve p = 2ε(1 − ε) for the ε up to one half, at which p is one half."""
    return (1 - sqrt(max(0.0, 1 - 2 * disagreement))) / 2
