"""Groups that are nearly the same as an earlier one, by their places."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, near_duplicates
from logratio.data.analysis.statistics import Places

THRESHOLD = 0.8
"""Two groups are similar from this Jaccard index of their shingles on."""

SHINGLE = 5
"""Tokens in a shingle."""

LISTED = 20
"""Most examples that are named."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """What was found; whoever is chosen.

    Attributes:
        threshold: Least Jaccard index.
        shingle: Tokens in the windows whose sets are compared.
        similar: Groups that resemble an earlier one, directly or through others.
        clusters: Sets of groups that hang together.
        largest: Groups in the largest of them.
        examples: Of the largest clusters, "place resembles place (similarity)".
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
    """Look for near-duplicates; seconds a million groups.

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
    """Choose the first link of each of the largest clusters."""
    return starts[np.argsort(-sizes, kind="stable")[:LISTED]]
