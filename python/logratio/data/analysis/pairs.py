"""Statistics of pairs: length bias, flipped labels, near-duplicates."""

from bisect import bisect_right
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, near_duplicates
from logratio.data.analysis.statistics import (
    Columns,
    Distribution,
    Places,
)
from logratio.intervals import Interval, around, wilson

THRESHOLD = 0.8
"""Default for the least Jaccard index of the shingles of similar groups."""

SHINGLE = 5
"""Tokens in a shingle."""

LISTED = 20
"""Most examples that are listed."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """Near-duplicates, regardless of which answer is chosen.

    Attributes:
        threshold: Least Jaccard index.
        shingle: Tokens per shingle, the windows whose sets are compared.
        similar: Groups that resemble an earlier one, directly or transitively.
        clusters: Connected sets of similar groups.
        largest: Groups in the largest cluster.
        examples: From the largest clusters, "place resembles place (similarity)".
    """

    threshold: float
    shingle: int
    similar: int
    clusters: int
    largest: int
    examples: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def similarity(
    store: Store, places: Places, threshold: float = THRESHOLD, shingle: int = SHINGLE
) -> Similarity:
    """Find near-duplicates, in seconds per million groups.

    Raises:
        ValueError: The threshold is not in (0, 1], or the shingle is 0.
    """
    links, similarities, clusters = near_duplicates(store, threshold, shingle)
    _, starts, sizes = np.unique(clusters, return_index=True, return_counts=True)
    return Similarity(
        threshold,
        shingle,
        len(links),
        len(sizes),
        int(sizes.max()) + 1 if len(sizes) else 1,
        tuple(
            f"{places[int(links[at, 1])]} resembles {places[int(links[at, 0])]} "
            f"({similarities[at]:.2f})"
            for at in _examples(starts, sizes).tolist()
        ),
    )


def _examples(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first link of each of the largest clusters."""
    return starts[np.argsort(-sizes, kind="stable")[:LISTED]]


NOTABLE_FLIPS = 0.05
"""Warn if the whole interval of the flip rate is above this."""


@dataclass(frozen=True, slots=True)
class FlipEstimate:
    """The estimated share of flipped judgements.

    If each judgement is flipped with probability ε, independently of the others and of the pair,
    two judgements of one pair disagree with probability 2ε(1 − ε). Then ε(1 − ε) is the variance of
    the judgements within a pair, pooled over all pairs that were judged more than once.

    If the assumptions fail, the estimate is a lower bound: copied rows always agree, and if some
    pairs are harder than others, the root of the mean variance is below the mean of ε. Errors that
    all judges share are not detected.

    Attributes:
        rate: ε, from 0 to 0.5 (0.5: judgements are random).
        interval: 95 % interval of ε, from Wilson's for the disagreement; conservative.
        disagreement: Estimated probability that two judgements of one pair disagree.
        judgements: Judgements of these pairs.
        pairs: Pairs that were judged more than once.
        contested: Pairs with judgements both ways.
    """

    rate: float
    interval: Interval
    disagreement: float
    judgements: int
    pairs: int
    contested: int

    @property
    def is_notable(self) -> bool:
        """Whether the whole interval is above `NOTABLE_FLIPS`."""
        return self.interval[0] > NOTABLE_FLIPS

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def estimate_flips(votes: NDArray[Any]) -> FlipEstimate | None:
    """Estimate the flip rate from the judgements of each pair.

    Args:
        votes: Integers `[R, 2]`: for each pair, the judgements for one completion and for the
            other. Pairs with fewer than two judgements are ignored.

    Returns:
        The estimate, or None if no pair was judged more than once.
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
    """Count repeated and contradictory rows as judgements, int64 `[R, 2]`.

    Each repetition counts as a pair with two equal judgements, each contradiction as a pair judged
    once each way. This is exact if no pair occurs more than twice in the data.
    """
    return np.repeat(np.array([[2, 0], [1, 1]]), [repeated, contradicted], axis=0)


def _flip_rate(disagreement: float) -> float:
    """Solve p = 2ε(1 − ε) for ε ≤ 1/2; p is at most 1/2."""
    return (1 - sqrt(max(0.0, 1 - 2 * disagreement))) / 2


SMALL_EFFECT = 0.2
"""Cohen's "small": warn from this standardised difference in length on."""

SMALL_SUPERIORITY = 0.58
"""The same for P(chosen longer): Φ(0.2), the value of an effect of 0.2 for normal lengths."""

MEDIUM_EFFECT, LARGE_EFFECT = 0.5, 0.8
MEDIUM_SUPERIORITY, LARGE_SUPERIORITY = 0.69, 0.79  # Φ of the above

_EFFECTS = (SMALL_EFFECT, MEDIUM_EFFECT, LARGE_EFFECT)
_SUPERIORITIES = (SMALL_SUPERIORITY, MEDIUM_SUPERIORITY, LARGE_SUPERIORITY)
_SIZES = (None, "small", "medium", "large")


@dataclass(frozen=True, slots=True, eq=False)
class LengthBias:
    """Lengths of chosen against rejected completions, in trained tokens.

    Attributes:
        kind: "paired": two completions of one prompt; "unpaired": good and bad completions of
            different prompts.
        chosen: Lengths of the chosen completions, or of the best in ranked lists.
        rejected: Lengths of the rejected completions, or of the worst in ranked lists.
        difference: Chosen minus rejected per pair. None: unpaired.
        longer: P(chosen is longer).
        equal: P(both are equally long).
        effect: Cohen's d. Paired: mean difference over its deviation (d_z); unpaired: difference of
            means over the pooled deviation. 0 if nothing varies.
        effect_interval: 95 %, from the large-sample variance 1/n + d²/2n (Hedges and Olkin).
        superiority: P(chosen longer) + P(equal) / 2, the common-language effect size: the accuracy
            of "the longer wins" with random ties.
        superiority_interval: 95 %, Wilson's; conservative.
    """

    kind: Literal["paired", "unpaired"]
    chosen: Distribution
    rejected: Distribution
    difference: Distribution | None
    longer: float
    equal: float
    effect: float
    effect_interval: Interval
    superiority: float
    superiority_interval: Interval

    @property
    def shorter(self) -> float:
        """P(chosen is shorter)."""
        return max(0.0, 1 - self.longer - self.equal)

    @property
    def best_accuracy(self) -> float:
        """Accuracy of the better of "the longer wins" and "the shorter wins"."""
        return max(self.superiority, 1 - self.superiority)

    @property
    def varies(self) -> bool:
        """Whether the lengths vary; otherwise Cohen's d is not defined."""
        if self.difference is not None:
            return len(self.difference.values) > 1
        return bool(self.chosen.deviation or self.rejected.deviation)

    @property
    def strength(self) -> str | None:
        """Strength of the bias: "small", "medium", "large", or None without a warning.

        The larger of both effect sizes; each counts only if its interval excludes "no effect", so
        that few pairs do not warn by chance.
        """
        return _SIZES[max(self._sizes())]

    @property
    def is_of_means(self) -> bool:
        """Whether Cohen's d alone determines the strength."""
        effect, superiority = self._sizes()
        return effect > superiority

    def _sizes(self) -> tuple[int, int]:
        """Return the size of the effect and of the superiority, as indices into `_SIZES`."""
        effect = abs(self.effect) if _excludes(self.effect_interval, 0.0) else 0.0
        superiority = self.best_accuracy if _excludes(self.superiority_interval, 0.5) else 0.5
        return bisect_right(_EFFECTS, effect), bisect_right(_SUPERIORITIES, superiority)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        found = asdict(self)
        for name in ("chosen", "rejected", "difference"):
            distribution = getattr(self, name)
            found[name] = None if distribution is None else distribution.to_dict()
        return found | {"shorter": self.shorter, "strength": self.strength}


def length_bias(columns: Columns) -> LengthBias | None:
    """Compare the lengths of better and worse completions; None if no completions are compared.

    In a store with pairs and unpaired feedback, only the pairs are used: they share a prompt.
    """
    better, worse = columns.compared()
    if len(better):
        return _paired(columns, better, worse)
    liked, disliked = columns.judged_alone()
    if len(liked) and len(disliked):
        return unpaired_bias(
            Distribution.of(columns.counted[liked]), Distribution.of(columns.counted[disliked])
        )
    return None


def _paired(columns: Columns, better: Any, worse: Any) -> LengthBias:
    chosen, rejected = columns.counted[better], columns.counted[worse]
    difference = Distribution.of(np.subtract(chosen, rejected, dtype=np.int64))
    count = difference.count
    longer = difference.above(0) / count
    equal = 1 - longer - (count - difference.above(-1)) / count
    spread = difference.deviation
    effect = difference.mean / spread if spread else 0.0
    superiority = longer + equal / 2
    return LengthBias(
        "paired",
        Distribution.of(chosen),
        Distribution.of(rejected),
        difference,
        longer,
        max(0.0, equal),
        effect,
        around(effect, 1 / count + effect**2 / (2 * count)),
        superiority,
        wilson(superiority, count),
    )


def unpaired_bias(chosen: Distribution, rejected: Distribution) -> LengthBias:
    """Compare two unpaired samples of lengths, neither of them empty."""
    up, down = chosen.count, rejected.count
    at_most = np.searchsorted(rejected.values, chosen.values, side="right")
    below = np.searchsorted(rejected.values, chosen.values, side="left")
    summed = np.concatenate([[0], np.cumsum(rejected.counts)])
    share = chosen.counts / up
    longer = float(share @ (summed[below] / down))
    equal = float(share @ ((summed[at_most] - summed[below]) / down))
    squares = (up - 1) * chosen.deviation**2 + (down - 1) * rejected.deviation**2
    spread = float(np.sqrt(squares / max(up + down - 2, 1)))
    effect = (chosen.mean - rejected.mean) / spread if spread else 0.0
    variance = (up + down) / (up * down) + effect**2 / (2 * (up + down))
    superiority = longer + equal / 2
    return LengthBias(
        "unpaired",
        chosen,
        rejected,
        None,
        longer,
        equal,
        effect,
        around(effect, variance),
        superiority,
        wilson(superiority, min(up, down)),  # its variance is at most p(1 − p) / min (Birnbaum)
    )


def _excludes(interval: Interval, value: float) -> bool:
    return not interval[0] <= value <= interval[1]
