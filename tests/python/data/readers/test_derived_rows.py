"""`--group-by` merges adjacent rows with equal values under a key."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from tokenizers_for_tests import save, with_bos, word_level

from logratio.data import FormatSettings, PreferenceTokenizer, build_store
from logratio.data.formats import Decoder
from logratio.data.readers import derived_rows, open_inputs
from logratio.data.readers.derived_rows import RowFunction
from logratio.data.readers.inputs import Reading
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.data.store import build
from logratio.data.store import ingest as intake_module

Row = dict[str, Any]
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def rating(prompt: str, response: str, *ratings: int | None) -> Row:
    return {"prompt": prompt, "response": response, **dict(zip(HELPSTEER, ratings, strict=True))}


def write(path: Path, rows: Sequence[Row | str]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(path: Path, **reading: Any) -> list[tuple[int, Any]]:
    (opened,) = open_inputs(path, Reading(**reading))
    return [(source.line, getattr(row, "code", row)) for source, row in opened]


def test_adjacent_rows_are_merged_and_others_are_not(tmp_path: Path) -> None:
    rows: list[Row | str] = [
        {"k": 1, "a": "x"},
        {"k": 1, "b": "y"},
        {"k": [2], "a": "z"},
        {"k": 1, "a": "w"},
    ]
    assert read(write(tmp_path / "rows.jsonl", rows), group_by="k") == [
        (1, {"k": 1, "a": ["x", None], "b": [None, "y"]}),
        (3, {"k": [2], "a": ["z"]}),
        (4, {"k": 1, "a": ["w"]}),
    ]


def test_refusals_do_not_split_a_group(tmp_path: Path) -> None:
    rows: list[Row | str] = [{"k": 1}, "broken", {"a": 1}, {"k": None}, {"k": 1}, {"k": 2}]
    assert read(write(tmp_path / "rows.jsonl", rows), group_by="k") == [
        (1, {"k": 1}),
        (2, "E101"),
        (3, "E201"),
        (4, "E202"),
        (6, {"k": 2}),
    ]
    assert read(write(tmp_path / "none.jsonl", []), group_by="k") == [(0, "E106")]


def test_too_many_adjacent_rows_are_refused_and_memory_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived_rows, "MOST", 3)
    rows: list[Row | str] = [*[{"k": 1}] * 4, {"k": 2}, *["broken"] * 4, {"k": 2}, {"k": 2}]
    found = read(write(tmp_path / "rows.jsonl", rows), group_by="k")
    assert [one for _, one in found] == [
        "E212",
        {"k": 2},
        *["E101"] * 4,
        {"k": 2},
    ]


def spread(row: Row) -> list[Row]:
    return [row] * row["n"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_reading_resumes_at_every_position(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"k": k, "n": n} for k, n in ((1, 1), (1, 3), (2, 2), (3, 1), (3, 0), (3, 1), (4, 2))]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(path, [*rows[:5], "broken", *rows[5:]])
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)

    def opened() -> Any:
        reading = Reading(function=RowFunction(spread), group_by="k")
        return open_inputs(path, reading)[0]

    whole = list(opened())
    assert [row["n"] for _, row in whole if isinstance(row, dict)] == [
        [1, 3, 3, 3],
        [2, 2],
        [1, 1],
        [2, 2],
    ]
    assert len([row for _, row in whole if isinstance(row, Refusal)]) == 1 + (kind == "jsonl")
    for cut in range(len(whole) + 1):
        first, rest = opened(), opened()
        iterator = iter(first)
        begun = [next(iterator) for _ in range(cut)]
        rest.resume_from(json.loads(json.dumps(first.mark())))
        assert begun + list(rest) == whole, cut
        again = opened()
        again.resume_from(json.loads(json.dumps(rest.mark())))
        assert list(again) == []


RATINGS = [
    rating("the cat", "sat on", 3, 4, 4, 2, 1),
    rating("the cat", "dog", 1, 4, 4, 2, 1),
    rating("the dog", "mat", 2, 4, 4, 2, 1),
    rating("the dog", "sat on", 2, 4, 4, 2, 1),
    rating("mat", "cat", 2, 4, 4, 2, 1),
]


def test_helpsteer2_ratings_become_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PreferenceTokenizer.load(save(tmp_path / "words", with_bos(word_level())))
    path = write(tmp_path / "train.jsonl", RATINGS)
    monkeypatch.setattr(build, "EVERY", 0.0)
    monkeypatch.setattr(intake_module, "BATCH_ROWS", 1)
    formats = FormatSettings(group_by="prompt", score="helpfulness")
    store, report = build_store(path, tokenizer, tmp_path / "s.store", formats=formats, resume=True)
    assert (report.read, len(store)) == (3, 1)
    assert report.refused_by_code == {"R310": 2}
    assert '"group_by": "prompt"' in store.metadata


def test_a_missing_rating_is_named(tmp_path: Path, run: Run) -> None:
    rows = [rating("c#", "a", 3, 4, 4, 2, 1), rating("c#", "b", None, 4, 4, 2, 1)]
    path = write(tmp_path / "train.jsonl", rows)
    flags = ("--group-by", "prompt", "--score", "helpfulness")
    code, out, _ = run("data", "inspect", path, *flags)
    assert code == 1 and "[E212] a 'helpfulness' is None" in out


def test_refusals_name_the_flags_that_read_ratings(tmp_path: Path, run: Run) -> None:
    with pytest.raises(InvalidRecordError, match=r"E206.*--group-by prompt --score helpfulness"):
        Decoder().decode(RATINGS[0], Source("train.jsonl", 1))
    path = write(tmp_path / "train.jsonl", RATINGS[:2])
    _, out, _ = run("data", "inspect", path)
    assert "HelpSteer2's ratings: --group-by prompt --score helpfulness" in out
    _, out, _ = run("data", "inspect", path, "--group-by", "prompt")
    assert "HelpSteer2's ratings: --score helpfulness" in out
    flags = ("--group-by", "prompt", "--score", "helpfulness")
    code, out, _ = run("data", "inspect", path, *flags)
    assert code == 0 and "rows of one 'prompt' together" in out
    assert "  chosen (score 3, margin 2)\n‹sat on›\n  rejected (score 1)\n‹dog›" in out


def test_thumbs_of_one_prompt_become_pairs_of_good_and_bad(tmp_path: Path, run: Run) -> None:
    said = (("a", True), ("b", False), ("c", True))
    rows = [{"prompt": "q", "completion": text, "label": label} for text, label in said]
    path = write(tmp_path / "thumbs.jsonl", rows)
    code, out, _ = run("data", "inspect", path, "--group-by", "prompt")
    assert code == 0 and "format     scored" in out
    assert "  chosen\n‹a›\n  rejected\n‹b›" in out


def test_one_score_per_answer_needs_no_other_flag(tmp_path: Path, run: Run) -> None:
    rows = [
        {"prompt": "q", "response": text, "reward": score} for text, score in (("a", 1), ("b", 2))
    ]
    path = write(tmp_path / "rewards.jsonl", rows)
    code, out, _ = run("data", "inspect", path)
    assert "one rated answer: --group-by prompt --score reward" in out
    code, out, _ = run("data", "inspect", path, "--group-by", "prompt")
    assert code == 0 and "  chosen (score 2, margin 1)\n‹b›\n  rejected (score 1)\n‹a›" in out
