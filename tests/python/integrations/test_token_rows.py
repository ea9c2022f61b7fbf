"""Rows of another trainer as a store: the same ids, truncation and masks give the same keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logratio._rust import content_key
from logratio.integrations.token_rows import ForeignRowsError, TokenRows, token_rows

Sequence = tuple[list[int], list[int]]
"""Ids fed to a model, and the trainer's loss mask."""


def batch_of(sequences: list[Sequence], side: str) -> Mapping[str, Any]:
    """Pad sequences as collators do; the padding looks like a loss token."""
    width = max(len(ids) for ids, _ in sequences)
    batch = {
        "input_ids": np.full((len(sequences), width), 7),
        "attention_mask": np.zeros((len(sequences), width), np.int64),
        "completion_mask": np.ones((len(sequences), width), np.int64),
    }
    for row, (ids, mask) in enumerate(sequences):
        at = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, at] = ids
        batch["attention_mask"][row, at] = 1
        batch["completion_mask"][row, at] = mask
    return batch


def written(pairs: list[tuple[Sequence, Sequence]], side: str, size: int, path: Path) -> TokenRows:
    """Write pairs, `size` per batch, with a collator that pads on `side`."""

    def collate(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        return batch_of([row["chosen"] for row in rows] + [row["rejected"] for row in rows], side)

    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    return token_rows((rows[i : i + size] for i in range(0, len(rows), size)), collate, path)


def random_pairs(count: int) -> list[tuple[Sequence, Sequence]]:
    """Pairs with one prompt or two, with masked tokens, and without any loss token."""
    random = np.random.default_rng(0)

    def side(prompt: list[int]) -> Sequence:
        ids = random.integers(0, 9, random.integers(1, 6)).tolist()
        mask = random.integers(0, 2, len(ids)).tolist() if random.random() < 0.3 else [1] * len(ids)
        return [*prompt, *ids], [0] * len(prompt) + mask

    pairs = []
    for _ in range(count):
        prompt, other = (random.integers(0, 9, random.integers(0, 4)).tolist() for _ in range(2))
        pairs.append((side(prompt), side(prompt if random.random() < 0.7 else other)))
    return pairs


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_side_has_the_key_of_the_collated_ids(side: str, tmp_path: Path) -> None:
    pairs = random_pairs(300)
    rows = written(pairs, side, 7, tmp_path / "rows.store")
    keys, groups = rows.store.keys(), [rows.store.group(i) for i in range(len(rows.store))]
    masks = [mask.tolist() for _, _, found, _ in groups for mask in found]
    empty = 0
    for pair, numbers in zip(pairs, rows.completions, strict=True):
        for (ids, mask), number in zip(pair, numbers, strict=True):
            scored = [place for place in range(1, len(ids)) if mask[place]]
            if not scored:
                assert number == -1
                empty += 1
                continue
            assert keys[number].tobytes() == content_key(np.array(ids, np.int32), scored[0])
            assert masks[number] == mask[scored[0] :]
    assert 0 < empty < 100
    assert rows.store.completions == 600 - empty


def test_one_prompt_is_stored_once_and_two_are_two_groups(tmp_path: Path) -> None:
    same = (([1, 2, 3], [0, 0, 1]), ([1, 2, 4, 5], [0, 0, 1, 1]))
    cut = (([2, 3], [0, 1]), ([4, 5], [1, 1]))  # "keep_end" kept less of one prompt
    rows = written([same, cut], "right", 2, tmp_path / "rows.store")
    assert [rows.store.group(i)[0].tolist() for i in range(len(rows.store))] == [[1, 2], [2], [4]]
    assert rows.completions.tolist() == [[0, 1], [2, 3]]
    assert rows.store.sources()[1].tolist() == [1, 2, 2]


def test_no_rows_are_an_empty_store(tmp_path: Path) -> None:
    rows = written([], "right", 1, tmp_path / "rows.store")
    assert (len(rows.store), rows.completions.shape) == (0, (0, 2))


def test_inputs_other_than_ids_are_refused() -> None:
    def collate(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        return {**batch_of([([1, 2], [0, 1])] * 2, "right"), "pixel_values": None}

    with pytest.raises(ForeignRowsError, match="feeds pixel_values to the model"):
        token_rows([[{}]], collate)
