"""Weights of turns, from rows of chats to the mask of a store and back."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_groups import weighted_store
from tokenizers_for_tests import CHATML, byte_level, save

from logratio._rust import CorruptStoreError, Store
from logratio.data.store import build, ingest, turn_weights
from logratio.data.store.build import build_store
from logratio.data.store.mismatches import with_mismatches
from logratio.data.store.turn_weights import (
    MOST,
    TurnWeights,
    WeightCounts,
    data_digest,
    extremes,
    weight_counts,
    with_weights,
)
from logratio.data.store.unpaired import without_pairs
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError

VALUES = [-1.0, 0.25, 3.0]


def test_weights_are_numbered_as_they_first_occur() -> None:
    weights = TurnWeights()
    first = np.array([1.0, 3.0, 0.0, -1.0, 3.0])
    assert weights.numbered(first).tolist() == [1, 2, 0, 3, 2]
    assert weights.numbered(np.array([0.5, -1.0])).tolist() == [4, 3]
    assert weights.values == [3.0, -1.0, 0.5]
    assert weights.at(weights.numbered(first)).tolist() == first.tolist()


def test_more_weights_than_a_mask_can_number_are_refused() -> None:
    weights = TurnWeights()
    weights.numbered(2 + np.arange(MOST, dtype=np.float64))
    with pytest.raises(ConfigError, match="254 different weights of turns: round them"):
        weights.numbered(np.array([0.5]))


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreferenceTokenizer:
    return PreferenceTokenizer.load(save(tmp_path / "bytes", byte_level()), chat_template=CHATML)


def turn(role: str, content: str, **more: float) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chats() -> list[dict[str, Any]]:
    """Pairs of two answers; the first of the chosen side is bad, and those of other rows differ."""
    chosen = [turn("assistant", "no", weight=-1), turn("user", "?"), turn("assistant", "yes")]
    rejected = [turn("assistant", "ma", weight=0.5), turn("user", "!"), turn("assistant", "so")]
    pair = {"prompt": [turn("user", "Is it?")], "chosen": chosen, "rejected": rejected}
    other = json.loads(json.dumps(pair))
    other["chosen"][0]["weight"] = 1
    other["rejected"][0]["weight"] = 0
    return [pair, other, json.loads(json.dumps(pair))]


def test_a_store_has_the_weight_of_every_token(
    tokenizer: PreferenceTokenizer, tmp_path: Path
) -> None:
    store, report = build_store(chats(), tokenizer, tmp_path / "a.store")
    assert store.is_weighted
    assert (report.read, report.kept, len(store)) == (3, 2, 2)
    weights = TurnWeights.of(store)
    assert weights.values == [-1.0, 0.5]
    found = []
    for group in range(2):
        _, completions, masks, _ = store.group(group)
        for ids, mask in zip(completions, masks, strict=True):
            runs: dict[float, list[int]] = {}
            for token, weight in zip(ids.tolist(), weights.at(mask).tolist(), strict=True):
                runs.setdefault(weight, []).append(token)
            texts = {w: tokenizer.decode(run) for w, run in runs.items()}
            found.append(
                {w: text.replace("<|im_end|>", "").strip() for w, text in texts.items() if w}
            )
    assert found == [
        {-1.0: "no", 1.0: "yes"},
        {0.5: "ma", 1.0: "so"},
        {1.0: "no\nyes"},
        {1.0: "so"},
    ]
    assert store.counted_lengths().tolist() == [np.count_nonzero(mask) for mask in masks_of(store)]


def test_rows_that_differ_only_in_weights_are_no_duplicates(
    tokenizer: PreferenceTokenizer,
) -> None:
    rows = [chats()[0], json.loads(json.dumps(chats()[0]))]
    rows[1]["chosen"][0]["weight"] = -2
    store, report = build_store(rows, tokenizer)
    assert (len(store), report.kept) == (2, 2)
    assert TurnWeights.of(store).values == [-1.0, 0.5, -2.0]


def test_the_digest_depends_on_the_values_of_weights(tokenizer: PreferenceTokenizer) -> None:
    rows = [chats()[0]]
    one, _ = build_store(rows, tokenizer)
    rows[0]["chosen"][0]["weight"] = -2
    other, _ = build_store(rows, tokenizer)
    assert one.digest == other.digest
    assert data_digest(one) != data_digest(other)
    plain, _ = build_store(chats()[1:2], tokenizer)
    assert data_digest(plain) == plain.digest


def test_a_store_without_weights_keeps_its_format(
    tokenizer: PreferenceTokenizer, tmp_path: Path
) -> None:
    store, _ = build_store(chats()[1:2], tokenizer, tmp_path / "plain.store")
    assert not store.is_weighted
    assert "turn_weights" not in json.loads(store.metadata)
    assert (tmp_path / "plain.store").read_bytes()[:12] == b"LRSTORE3\x03\0\0\0"
    build_store(chats()[:1], tokenizer, tmp_path / "weighted.store")
    assert (tmp_path / "weighted.store").read_bytes()[:12] == b"LRSTORE4\x04\0\0\0"


def masks_of(store: Store) -> list[list[int]]:
    return [mask.tolist() for group in range(len(store)) for mask in store.group(group)[2]]


def test_weights_that_the_metadata_do_not_list_are_damage() -> None:
    store = weighted_store("pairs", VALUES)
    bare = store.select(np.ones(len(store), bool), None, "{}")
    with pytest.raises(CorruptStoreError, match="lists none"):
        TurnWeights.of(bare)
    with pytest.raises(CorruptStoreError, match="number 4, for which there is no weight"):
        TurnWeights(VALUES[:2]).at(np.array([0, 4, 1], np.uint8))


def test_an_interrupted_build_continues_with_its_weights(
    tokenizer: PreferenceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chats()[0] for _ in range(40)]
    for number, row in enumerate(rows):
        row["chosen"] = [{**row["chosen"][0], "weight": -1 - number}, *row["chosen"][1:]]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(ingest, "BATCH_ROWS", 4)
    monkeypatch.setattr(build, "EVERY", 0.0)

    def fail(read: int, *_: int) -> None:
        if read > 20:
            raise KeyboardInterrupt

    path, told = tmp_path / "a.store", list[str]()
    with pytest.raises(KeyboardInterrupt):
        build_store(data, tokenizer, path, resume=True, progress=fail)
    store, _ = build_store(data, tokenizer, path, resume=True, tell=told.append)
    assert "continues after" in told[0]
    whole, _ = build_store(data, tokenizer)
    assert data_digest(store) == data_digest(whole)
    assert len(TurnWeights.of(store).values) == 41


def test_masks_are_read_in_any_order() -> None:
    store = weighted_store("pairs", VALUES)
    rows = np.array([3, 0, 3, 7])
    assert store.mask(rows).tolist() == [*chain(*(masks_of(store)[row] for row in rows))]
    with pytest.raises(IndexError):
        store.mask(np.array([store.completions]))


def test_copies_of_a_store_keep_the_weights() -> None:
    store = weighted_store("pairs", VALUES)
    keep = np.arange(len(store)) % 2 == 1
    kept = store.select(keep, None, store.metadata)
    wanted = [mask for number, mask in enumerate(masks_of(store)) if keep[number // 2]]
    assert (masks_of(kept), TurnWeights.of(kept).values) == (wanted, VALUES)
    single = without_pairs(store, None)
    assert (masks_of(single), TurnWeights.of(single).values) == (masks_of(store), VALUES)


def test_the_answer_to_another_prompt_has_no_weights() -> None:
    firsts = without_pairs(weighted_store("pairs", VALUES), None)
    whole = with_mismatches(firsts, 0, None, 1000)
    assert masks_of(whole)[::2] == masks_of(firsts)
    assert {value for mask in masks_of(whole)[1::2] for value in mask} <= {0, 1}


def test_extremes_are_those_of_counted_tokens() -> None:
    store = weighted_store("lists", VALUES)
    low, high = extremes(store)
    weights = TurnWeights.of(store)
    for group in range(len(store)):
        found = np.concatenate(store.group(group)[2])
        counted = weights.at(found)[found != 0]
        assert (low[group], high[group]) == (counted.min(), counted.max())


def test_a_mask_of_weights_in_an_old_format_is_damage(tmp_path: Path) -> None:
    """The digit and the version of the header are changed, so its checksum does not match."""
    weighted_store("pairs", VALUES, path=tmp_path / "a.store")
    data = (tmp_path / "a.store").read_bytes()
    (tmp_path / "a.store").write_bytes(b"LRSTORE3\x03" + data[9:])
    with pytest.raises(CorruptStoreError, match="checksum"):
        Store.open(tmp_path / "a.store")


@pytest.mark.parametrize("together", [1, 3, 1 << 16])
def test_tokens_with_weights_are_counted_in_parts_of_any_size(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_weights, "_TOGETHER", together)
    store = weighted_store("lists", VALUES)
    table = TurnWeights.of(store)
    each = [table.at(np.array(mask, np.uint8)).tolist() for mask in masks_of(store)]
    other = [[one for one in own if one not in (0, 1)] for own in each]
    bad = [[one for one in own if one < 0] for own in each]
    assert weight_counts(store) == WeightCounts(
        "token",
        sum(map(len, other)),
        sum(map(bool, other)),
        sum(map(len, bad)),
        sum(map(bool, bad)),
        -1.0,
        3.0,
    )


def test_groups_with_weights_are_found(tokenizer: PreferenceTokenizer) -> None:
    store, _ = build_store(chats(), tokenizer)
    assert with_weights(store).tolist() == [True, False]
    plain, _ = build_store(chats()[1:2], tokenizer)
    assert with_weights(plain).tolist() == [False]
    assert weight_counts(plain) is None


def test_counts_are_written_with_their_range() -> None:
    owners = np.array([0, 0, 1, 2], np.int64)
    found = WeightCounts.of("token", np.array([1, 0.5, 3, 0.0]), owners)
    words = "tokens of turns with a weight other than 0 and 1: 2 in 2 completions, 0.5 … 3"
    assert str(found) == f"{words}; none below 0"
    assert WeightCounts.of("turn", np.array([1.0, 0.0]), owners[:2]) is None
