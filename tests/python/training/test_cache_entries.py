"""Cache entries: the selected rows, and their sums."""

import numpy as np
import pytest
import torch
from stores import store_of

from logratio.data.feed import lay_out
from logratio.logps.batch import to_torch
from logratio.training.reference_scorer import (
    ScoredCompletions,
    SumEntries,
    TokenEntries,
    Work,
    counted_sums,
    first_rows,
)


@pytest.mark.parametrize("crowded", [False, True])
def test_first_row_of_each_key(crowded: bool) -> None:
    """Also where keys agree in their first 64 bits and differ after them."""
    random = np.random.default_rng(3)
    different = random.integers(0, 256, (40, 32)).astype(np.uint8)
    if crowded:
        different[:, :8] = different[:4, :8].repeat(10, axis=0)
    keys = different[random.integers(0, 40, 300)]
    seen: dict[bytes, int] = {}
    for row, key in enumerate(keys):
        seen.setdefault(key.tobytes(), row)
    assert first_rows(keys).tolist() == sorted(seen.values())
    assert first_rows(keys[:0]).tolist() == []


def taken() -> ScoredCompletions:
    """Completions 0, 2 and 3 of two groups, with every third token not counted."""
    store = store_of((3, [4, 5]), (2, [6, 1]))
    arrays = lay_out(store, np.array([0, 1]), "shared")
    arrays.completion_mask[::3] = False
    logps = -np.arange(1, 17, dtype=np.float32)
    return ScoredCompletions(arrays, logps, np.array([True, False, True, True]))


def test_only_wanted_completions_are_taken() -> None:
    found = taken()
    assert found.rows.tolist() == [0, 2, 3]
    assert found.lengths.tolist() == [4, 6, 1]
    assert found.logps.tolist() == [-1, -2, -3, -4, *range(-10, -16, -1), -16]


def test_sums_are_over_the_tokens_that_count() -> None:
    counts, sums = counted_sums(taken())
    assert [counts.dtype.name, sums.dtype.name] == ["uint32", "float64"]
    # Tokens 0, 3, 6, 9, 12 and 15 of the sixteen do not count.
    assert counts.tolist() == [2, 4, 0]
    assert sums.tolist() == [-2 - 3, -11 - 12 - 14 - 15, 0]


def test_sums_are_float64_from_the_first_addition() -> None:
    """In float32, 2²⁴ + 1 is 2²⁴: the small ones would be lost one by one."""
    store = store_of((1, [1001]))
    logps = np.full(1001, -1.0, dtype=np.float32)
    logps[0] = -(2.0**24)
    found = ScoredCompletions(lay_out(store, np.array([0]), "shared"), logps, np.array([True]))
    assert counted_sums(found)[1].tolist() == [-(2.0**24) - 1000]


def test_sums_agree_with_those_that_training_makes() -> None:
    store = store_of((3, [40, 50]), (2, [60, 10]))
    arrays = lay_out(store, np.array([0, 1]), "padded")
    logps = np.random.default_rng(0).normal(-3, 1, 160).astype(np.float32)
    _, sums = counted_sums(ScoredCompletions(arrays, logps, np.ones(4, dtype=bool)))
    expected = to_torch(arrays).targets.sums(torch.from_numpy(logps))
    assert np.allclose(sums, expected.numpy(), rtol=1e-5)


def test_groups_of_the_wanted_completions() -> None:
    store = store_of((3, [4, 5]), (2, [6]), (1, [2, 3, 4]))
    rows = np.array([1, 3, 5])
    work = Work(store, store.keys(), rows, folder=None, fingerprint=None)  # type: ignore[arg-type]
    assert work.groups.tolist() == [0, 2]
    assert np.flatnonzero(work.wanted).tolist() == [1, 3, 5]
    assert work.tokens == 5 + 2 + 4


def test_a_sum_takes_44_bytes_and_a_token_4() -> None:
    assert SumEntries().nbytes(1000, 10**9) == 44_000
    assert TokenEntries().nbytes(10, 100) == 760
