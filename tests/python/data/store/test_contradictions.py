"""Contradictory pairs, and lists with omitted parts: the counts remain correct."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers_for_tests import save, word_level

from logratio._rust import Store
from logratio.data import BadDataError, FormatSettings, PreferenceTokenizer, build_store
from logratio.data.store.build import losers
from logratio.data.store.value_counts import value_counts


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreferenceTokenizer:
    return PreferenceTokenizer.load(save(tmp_path / "words", word_level()))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(chosen: str, rejected: str, prompt: str = "the") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


ROWS = [
    pair("cat", "dog") | {"weight": 0.5},  # two rows for it, one against it
    pair("mat", "dog") | {"weight": 3, "margin": 1},  # undisputed
    pair("dog", "cat"),
    pair("cat", "dog"),
    pair("yes", "no"),  # a tie
    pair("no", "yes"),
]


def lines(store: Store) -> list[int]:
    return [int(line) for line in store.sources()[1]]


@pytest.mark.parametrize(
    ("conflicts", "kept", "refused"),
    [("keep", [1, 2, 3, 5, 6], 0), ("majority", [1, 2], 3), ("drop_both", [2], 4)],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_contradictions_are_resolved_by_the_setting(
    tmp_path: Path,
    tokenizer: PreferenceTokenizer,
    conflicts: Any,
    kept: list[int],
    refused: int,
    on_disk: bool,
) -> None:
    path = tmp_path / "out.store" if on_disk else None
    file = write(tmp_path / "rows.jsonl", ROWS)
    store, report = build_store([file], tokenizer, path, conflicts=conflicts)
    assert lines(store) == kept
    assert (report.read, report.kept, report.refused, report.deduplicated) == (
        6, len(kept), refused, 1,
    )  # fmt: skip
    assert report.warnings_by_code["W507"] == 2
    assert report.places["W507"] == [f"{file}:3 against {file}:1", f"{file}:6 against {file}:5"]
    assert sum("R308" in code for code in report.refused_by_code.elements()) == refused
    assert report.prompt_tokens + report.completion_tokens == store.tokens
    assert report.values == value_counts(store.values())
    assert report.values["weight"].count == (2 if conflicts == "drop_both" else 4)
    assert json.loads(store.metadata)["report"] == report.to_dict()
    left = {"rows.jsonl", "words", *(["out.store"] if on_disk else [])}
    assert {entry.name for entry in tmp_path.iterdir()} == left


def test_rows_that_lose_are_listed(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    log = tmp_path / "refused.jsonl"
    file = write(tmp_path / "rows.jsonl", ROWS)
    build_store([file], tokenizer, refused=log, conflicts="majority")
    listed = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["line"], entry["code"]) for entry in listed] == [
        (3, "R308"), (5, "R308"), (6, "R308"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("conflicts", "counts"), [("keep", (5, 0)), ("majority", (2, 3)), ("drop_both", (1, 4))]
)
def test_rows_of_one_line_are_rows(
    tmp_path: Path, tokenizer: PreferenceTokenizer, conflicts: Any, counts: tuple[int, int]
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    store, report = build_store([file], tokenizer, conflicts=conflicts)
    assert len(store) == counts[0]
    assert (report.read, report.kept, report.refused, report.deduplicated) == (6, *counts, 1)


def test_nothing_may_be_left(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS[4:])
    with pytest.raises(BadDataError, match="no row was kept"):
        build_store([file], tokenizer, tmp_path / "out.store", conflicts="majority")
    assert {entry.name for entry in tmp_path.iterdir()} == {"rows.jsonl", "words"}


def test_an_unknown_conflicts_setting_is_refused(
    tmp_path: Path, tokenizer: PreferenceTokenizer
) -> None:
    with pytest.raises(ValueError, match=r"conflicts must be one of keep.*, not 'all'"):
        build_store([tmp_path], tokenizer, conflicts="all")  # type: ignore[arg-type]


def test_losers_by_votes() -> None:
    groups = np.array([[0, 2], [4, 5], [7, 6]])
    votes = np.array([[2, 1], [1, 1], [1, 5]], np.uint32)
    assert losers(groups, votes, by_majority=True).tolist() == [2, 4, 5, 7]
    assert losers(groups, votes, by_majority=False).tolist() == [0, 2, 4, 5, 6, 7]


LIST = {
    "prompt": "the",
    "answers": [
        {"answer": "cat", "rank": 0},
        {"answer": "dog", "rank": 1},
        {"answer": "mat", "rank": 1},
    ],
}


def test_a_row_of_several_pairs_is_one_row(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    file = write(tmp_path / "rows.jsonl", [pair("cat", "dog"), LIST, LIST])
    store, report = build_store([file], tokenizer)
    assert lines(store) == [1, 2]  # cat over dog is a duplicate; dog and mat tie
    assert (report.read, report.kept, report.deduplicated, report.refused) == (3, 2, 1, 0)
    assert report.warnings_by_code["W530"] == 3


def test_a_list_whose_pairs_are_all_withdrawn_is_refused_once(
    tmp_path: Path, tokenizer: PreferenceTokenizer
) -> None:
    rows = [LIST, pair("dog", "cat"), pair("mat", "cat"), pair("yes", "no")]
    store, report = build_store(
        [write(tmp_path / "rows.jsonl", rows)], tokenizer, conflicts="drop_both"
    )
    assert lines(store) == [4]
    assert (report.read, report.kept, report.refused) == (4, 1, 3)


def test_a_list_that_loses_one_pair_stays(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    file = write(tmp_path / "rows.jsonl", [LIST, pair("dog", "cat")])
    store, report = build_store([file], tokenizer, conflicts="drop_both")
    assert lines(store) == [1]
    assert (report.read, report.kept, report.refused) == (2, 1, 1)


def test_a_list_may_stay_a_group(tmp_path: Path, tokenizer: PreferenceTokenizer) -> None:
    file = write(tmp_path / "rows.jsonl", [LIST])
    store, report = build_store([file], tokenizer, formats=FormatSettings(lists="groups"))
    assert store.completion_offsets().tolist() == [0, 3]
    assert report.kept == 1
