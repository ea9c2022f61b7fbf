"""Pairs become single answers: nothing else of the data changes."""

from pathlib import Path

import numpy as np
import pytest
from method_groups import store_for

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data.store import slices
from logratio.data.store.unpaired import are_pairs, without_pairs
from logratio.errors import ConfigError

Answer = tuple[list[int], list[int], list[int], int, list[float], int]


def answers(store: Store) -> list[Answer]:
    """List prompt, ids, mask, role, values and line of every answer, one by one."""
    values, (_, lines), roles = store.values(), store.sources(), store.roles()
    found: list[Answer] = []
    for group in range(len(store)):
        prompt, ids, masks, owned = store.group(group)
        for text, mask, role in zip(ids, masks, owned.tolist(), strict=True):
            row = len(found)
            assert role == roles[row]
            parts = prompt.tolist(), text.tolist(), mask.tolist()
            found.append((*parts, role, values[row].tolist(), int(lines[group])))
    return found


def test_each_answer_keeps_its_prompt_tokens_mask_role_values_and_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = store_for("pairs", 9, weight=2.0)
    assert are_pairs(store).all()
    found = without_pairs(store, tmp_path / "answers.store")
    assert len(found) == found.completions == 18
    assert np.diff(found.completion_offsets()).tolist() == [1] * 18
    np.testing.assert_equal(answers(found), answers(store))
    assert found.digest == Store.open(tmp_path / "answers.store").digest
    for tokens in (1, 30):
        monkeypatch.setattr(slices, "SLICE_TOKENS", tokens)
        assert without_pairs(store, None).digest == found.digest


def test_other_groups_stay_as_they_are() -> None:
    labelled = store_for("labelled answers", 6)
    assert not are_pairs(labelled).any()
    assert without_pairs(labelled, None).digest == labelled.digest
    writer = StoreWriter()
    for line, roles in enumerate((["chosen"], ["chosen", "rejected"], ["rejected"])):
        size = len(roles)
        writer.push(
            np.array([9, line], np.int32),
            np.arange(size, dtype=np.int32) + 3,
            np.ones(size, np.uint8),
            np.ones(size, np.uint32),
            np.array([ROLES.index(role) for role in roles], np.uint8),
            0,
            line + 1,
        )
    mixed = writer.finish()
    assert len(without_pairs(mixed, None)) == 4
    np.testing.assert_equal(answers(without_pairs(mixed, None)), answers(mixed))


def test_several_pairs_of_one_row_are_refused() -> None:
    writer = StoreWriter()
    for number, line in enumerate((1, 2, 2)):
        writer.push(
            np.array([5], np.int32),
            np.array([6 + number, 9], np.int32),
            np.ones(2, np.uint8),
            np.ones(2, np.uint32),
            np.array([0, 1], np.uint8),
            0,
            line,
        )
    with pytest.raises(ConfigError, match=r":2 makes several pairs, .*best_worst"):
        without_pairs(writer.finish(), None)
