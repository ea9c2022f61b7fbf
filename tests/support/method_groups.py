"""Stores of random groups for every kind of data that a method trains on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import WORDS

from logratio._rust import ROLES, Store, StoreWriter
from logratio.training.methods.method import DataKind

ANIMALS, VERBS, PLACES = WORDS[5:8], WORDS[8:11], WORDS[14:17]
_ROLES: dict[DataKind, list[list[str]]] = {
    "pairs": [["chosen", "rejected"]],
    "labelled answers": [["chosen", "mismatched"], ["rejected", "mismatched"]],
    "lists": [["candidate"] * 2, ["candidate"] * 3, ["candidate"] * 5],
    "demonstrations": [["demonstration"]],
}


def store_for(
    data: DataKind,
    groups: int = 8,
    seed: int = 0,
    weight: float | None = None,
    *,
    tied: bool = False,
) -> Store:
    """Make groups of ragged random tokens, with margins and scores where the data has them.

    With `weight`, the groups have random weights up to it.
    """
    random, writer = np.random.default_rng(seed), StoreWriter()
    for line in range(groups):
        roles = _ROLES[data][line % len(_ROLES[data])]
        lengths = random.integers(1, 14, len(roles)).astype(np.uint32)
        total = int(lengths.sum())
        values = np.full((len(roles), 4), np.nan, np.float32)
        if data == "lists":
            values[:, 0] = 0.0 if tied else random.permutation(len(roles)) / 2
        if data == "pairs":
            values[0, 2] = random.uniform(0.5, 3)
        if weight is not None:
            values[:, 3] = random.uniform(0, weight)
        writer.push(
            random.integers(3, 200, int(random.integers(1, 20))).astype(np.int32),
            random.integers(3, 200, total).astype(np.int32),
            (random.random(total) < 0.9).astype(np.uint8) | _last(lengths),
            lengths,
            np.array([ROLES.index(role) for role in roles], np.uint8),
            0,
            line,
            values,
        )
    return writer.finish()


def weighted_store(
    data: DataKind, values: list[float], groups: int = 8, path: Path | None = None
) -> Store:
    """Make the groups of `store_for`, whose counted tokens have random weights: 1, or a value.

    The answers to other prompts have none.
    """
    plain, random, writer = store_for(data, groups), np.random.default_rng(1), StoreWriter(path)
    offsets = plain.completion_offsets()
    for group in range(groups):
        prompt, completions, masks, roles = plain.group(group)
        drawn = [random.integers(1, 2 + len(values), len(mask)).astype(np.uint8) for mask in masks]
        is_other = roles == ROLES.index("mismatched")
        writer.push(
            prompt,
            np.concatenate(completions),
            np.concatenate(
                [
                    mask if other else mask * codes
                    for mask, codes, other in zip(masks, drawn, is_other, strict=True)
                ]
            ),
            np.array([len(ids) for ids in completions], np.uint32),
            roles,
            0,
            group,
            plain.values()[offsets[group] : offsets[group + 1]],
        )
    return writer.finish(json.dumps({"turn_weights": values, "files": ["weighted.jsonl"]}))


def _last(lengths: np.ndarray) -> np.ndarray:
    """Mark the last token of each completion, which always counts."""
    marks = np.zeros(int(lengths.sum()), np.uint8)
    marks[np.cumsum(lengths) - 1] = 1
    return marks


def write_answers(path: Path, count: int) -> Path:
    """Write single answers with labels: every second one is good."""
    ends = " happy", " sad"
    return _written(
        path,
        (
            {**_prompt(i), "completion": _place(i) + ends[i % 2], "label": i % 2 == 0}
            for i in range(count)
        ),
    )


def write_lists(path: Path, count: int) -> Path:
    """Write lists of two to four answers with scores, some of them equal."""
    ends = " happy", " sad", " sad sad", " loud"

    def answer(i: int, k: int) -> dict[str, Any]:
        return {"response": _place(i) + ends[k], "score": float((k * 2 + i) % 5 // 2)}

    return _written(
        path,
        (
            {**_prompt(i), "responses": [answer(i, k) for k in range(2 + i % 3)]}
            for i in range(count)
        ),
    )


def _prompt(i: int) -> dict[str, str]:
    return {"prompt": f"the {ANIMALS[i % 3]} {VERBS[i // 3 % 3]}" + " loud" * (i % 4)}


def _place(i: int) -> str:
    return f" in the {PLACES[i // 9 % 3]}"


def _written(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
