"""Every group gets the answer to another prompt."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data.store import slices
from logratio.data.store.mismatches import mismatched_groups, with_mismatches
from logratio.errors import ConfigError

LONG = 1000
NAN = float("nan")


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def kto_store(prompts: list[int], path: Path | None = None) -> Store:
    """Groups of one or two answers with unlike lengths, masks and values."""
    writer = StoreWriter(path)
    for number, prompt in enumerate(prompts):
        lengths = [3 + number % 5, 2][: 1 + number % 2]
        total = sum(lengths)
        mask = np.ones(total, np.uint8)
        mask[0] = number % 3 > 0
        values = [[number, NAN, NAN, 0.5], [number / 2, NAN, NAN, 0.25]][: len(lengths)]
        writer.push(
            np.full(1 + prompt % 4, prompt, np.int32),
            np.arange(100 * number, 100 * number + total, dtype=np.int32),
            mask,
            np.array(lengths, np.uint32),
            np.array([number % 2, 1 - number % 2][: len(lengths)], np.uint8),
            number % 3,
            number + 1,
            np.array(values, np.float32),
        )
    return writer.finish('{"files": ["a", "b", "c"]}')


def groups_of(store: Store) -> list[Any]:
    return [
        (prompt.tolist(), [one.tolist() for one in own], [m.tolist() for m in masks], r.tolist())
        for prompt, own, masks, r in map(store.group, range(len(store)))
    ]


def partners(before: Store, after: Store) -> list[int]:
    """The group whose answer each group got; an answer of `kto_store` begins with its number."""
    return [int(own[-1][0]) // 100 for _, own, _, _ in map(after.group, range(len(before)))]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 5))
@example([1, 1, 1, 1, 2], 0)
@example([1, 2], 3)
def test_no_group_gets_its_own_prompts_answer(prompts: list[int], seed: int) -> None:
    if len(set(prompts)) < 2:
        return
    found = mismatched_groups(np.array(prompts, np.uint64), seed)
    assert all(prompts[one] != prompts[other] for one, other in enumerate(found.tolist()))
    most = max(Counter(prompts).values())
    if most <= len(prompts) / 2:
        assert sorted(found.tolist()) == list(range(len(prompts)))


def test_every_group_is_kept_and_gets_the_first_answer_to_another_prompt() -> None:
    prompts = [number % 7 for number in range(50)]
    before = kto_store(prompts)
    after = with_mismatches(before, 1, None, LONG)
    found = partners(before, after)
    assert all(prompts[one] != prompts[other] for one, other in enumerate(found))
    for own, whole, other in zip(groups_of(before), groups_of(after), found, strict=True):
        prompt, answers, masks, roles = own
        _, (first, *_), (mask, *_), _ = groups_of(before)[other]
        mismatched = [*roles, ROLES.index("mismatched")]
        assert whole == (prompt, [*answers, first], [*masks, mask], mismatched)


def test_sources_values_and_metadata_are_kept() -> None:
    before = kto_store([number % 7 for number in range(20)])
    after = with_mismatches(before, 1, None, LONG)
    for one, other in zip(before.sources(), after.sources(), strict=True):
        assert_array_equal(one, other)
    is_new = after.roles() == ROLES.index("mismatched")
    assert is_new.sum() == len(before)
    assert_array_equal(after.values()[~is_new], before.values())
    assert np.isnan(after.values()[is_new]).all()
    assert after.metadata == before.metadata


def test_an_answer_is_cut_to_the_room_that_the_prompt_leaves() -> None:
    before = kto_store([number % 7 for number in range(30)])
    after = with_mismatches(before, 0, None, 5)
    assert int(before.prompt_lengths().max()) == 4
    found = zip(groups_of(before), groups_of(after), partners(before, after), strict=True)
    lengths = set()
    for (prompt, *_), (_, answers, masks, _), other in found:
        _, (first, *_), (mask, *_), _ = groups_of(before)[other]
        cut = min(len(first), 5 - len(prompt))
        assert answers[-1] == first[:cut]
        # Where only untrained tokens are left, they count: KTO needs a log-prob.
        assert masks[-1] == (mask[:cut] if any(mask[:cut]) else [1] * cut)
        lengths.add(cut)
    assert lengths == {1, 2, 3, 4}


def test_the_seed_decides_and_the_slices_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = kto_store([number % 7 for number in range(60)])
    first = with_mismatches(before, 3, None, 6)
    on_disk = with_mismatches(before, 3, tmp_path / "whole.store", 6)
    assert first.digest == on_disk.digest == Store.open(tmp_path / "whole.store").digest
    assert with_mismatches(before, 4, None, 6).digest != first.digest
    for tokens in (1, 17, 100):
        monkeypatch.setattr(slices, "SLICE_TOKENS", tokens)
        assert with_mismatches(before, 3, None, 6).digest == first.digest


def test_too_few_prompts_or_too_little_room_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "whole.store"
    for prompts in ([], [3, 3, 3]):
        with pytest.raises(ConfigError, match="to another prompt"):
            with_mismatches(kto_store(prompts), 0, path, LONG)
    with pytest.raises(ConfigError, match="max_length is 4, but a prompt has 4 tokens"):
        with_mismatches(kto_store([1, 2, 3]), 0, path, 4)
    assert not list(tmp_path.iterdir())
