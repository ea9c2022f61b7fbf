"""Shares: every group is in exactly one, chosen by its content alone."""

import numpy as np
import pytest

from logratio.training.precomputation import Share, ShareError, share_of


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32)).astype(np.uint8)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_a_partition_and_even(count: int) -> None:
    held = np.array([Share(index, count).holds(keys(6000)) for index in range(count)])
    assert (held.sum(0) == 1).all()
    assert np.abs(held.sum(1) - 6000 / count).max() < 5 * np.sqrt(6000 / count)


def test_order_and_company_do_not_matter() -> None:
    every, shuffled = keys(100), np.random.default_rng(1).permutation(100)
    held = Share(1, 3).holds(every)
    assert (Share(1, 3).holds(every[shuffled]) == held[shuffled]).all()
    assert (Share(1, 3).holds(every[40:50]) == held[40:50]).all()


def test_the_first_eight_bytes_of_the_key_decide() -> None:
    """Fixed for ever: processes of two versions may fill one cache."""
    key = np.array([[7, 1, *[0] * 6, *[255] * 24]], dtype=np.uint8)
    assert [Share(index, 5).holds(key)[0] for index in range(5)] == [
        index == (7 + 256) % 5 for index in range(5)
    ]


@pytest.mark.parametrize(
    ("given", "environment", "index", "count", "rank"),
    [
        (None, {}, 0, 1, 0),
        ("2/4", {}, 1, 4, 0),
        (None, {"RANK": "1", "WORLD_SIZE": "3"}, 1, 3, 1),
        ("2/4", {"RANK": "1", "WORLD_SIZE": "3"}, 4, 12, 1),
        (None, {"WORLD_SIZE": "3"}, 0, 1, 0),  # of some other tool
    ],
)
def test_flag_and_torchrun_together(
    given: str | None, environment: dict[str, str], index: int, count: int, rank: int
) -> None:
    share = share_of(given, environment)
    assert (share.index, share.count, share.rank) == (index, count, rank)
    assert str(share) == f"{index + 1}/{count}"


@pytest.mark.parametrize("given", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_malformed_shares_are_refused(given: str) -> None:
    with pytest.raises(ShareError, match=r"1/N to N/N"):
        share_of(given, {})
