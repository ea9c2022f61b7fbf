"""Pairs of text encoded in bulk equal those that are decoded and tokenized one by one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers_for_tests as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from logratio._rust import Store
from logratio.data import BadDataError, DataReport, PreferenceTokenizer, build_store
from logratio.data.store.ingest import PlainTable
from logratio.data.tokenization.groups import TokenizationRules

FOLDERS: dict[str, Callable[[], Tokenizer]] = {
    "plain": made.byte_level,
    "bos": lambda: made.with_bos(made.byte_level()),
}
RULES = {
    "short": TokenizationRules(max_length=12, max_prompt_length=6),
    "cut": TokenizationRules(max_length=12, prompt_truncation="keep_end", append_eos=False),
    "long": TokenizationRules(),
    "split": TokenizationRules(split_special_tokens=True),
}
WORDS = ["the cat", " sat", ".", " ", "\n\n", "'s", "</s>", "<s>", "\0", "\x1c", "é", " 日", "12"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
ROW = st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), TEXT))
SIDES = ("score_chosen", "score_rejected")
NUMBERS = {
    **dict.fromkeys(SIDES, st.none() | st.integers(-1, 3) | st.just(1e300)),
    "margin": st.none() | st.sampled_from([-1.0, 0.0, 2.5, float("nan"), float("inf")]),
    "weight": st.none() | st.sampled_from([0.0, 0.25, 1.0, float("nan"), -1.0, float("inf")]),
}
"""Columns of values, with those that are refused or warned about."""
ODD = ROW | st.fixed_dictionaries(
    {"prompt": TEXT, "chosen": TEXT | st.none() | st.integers(0, 1), "rejected": TEXT},
    optional=NUMBERS | {"score": st.none() | st.integers(0, 3), "system": TEXT, "note": TEXT},
)
START = {"prompt": "the cat", "chosen": " sat.", "rejected": " sat 12"}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save(tmp_path_factory.mktemp("tokenizer"), FOLDERS[request.param]())


@pytest.fixture(params=RULES)
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> PreferenceTokenizer:
    tokenizer = PreferenceTokenizer.load(folder, RULES[request.param])
    assert tokenizer.takes_pairs
    return tokenizer


def groups(store: Store) -> list[Any]:
    return [
        (prompt.tolist(), [ids.tolist() for ids in completions], [m.tolist() for m in masks])
        for prompt, completions, masks, _ in map(store.group, range(len(store)))
    ] + [[part.tolist() for part in store.sources()], repr(store.values().tolist())]


def message(report: DataReport) -> dict[str, Any]:
    """Places are listed in the order of discovery, which may differ within a batch."""
    whole = report.to_dict()
    return whole | {"places": {code: sorted(places) for code, places in whole["places"].items()}}


def built(inputs: list[Any], tokenizer: PreferenceTokenizer) -> Any:
    try:
        store, report = build_store(inputs, tokenizer, max_bad_fraction=1.0)
    except BadDataError as error:
        return str(error)
    return groups(store), message(report)


def both_ways(inputs: list[Any], tokenizer: PreferenceTokenizer) -> Iterator[Any]:
    for takes_pairs in (True, False):
        tokenizer.takes_pairs = takes_pairs
        yield built(inputs, tokenizer)
    tokenizer.takes_pairs = True


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(ODD, max_size=12))
def test_lines_in_bulk_are_lines_one_by_one(
    tokenizer: PreferenceTokenizer, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [START, *rows]))
    in_bulk, one_by_one = both_ways([path], tokenizer)
    assert in_bulk == one_by_one


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(ROW, max_size=12), st.integers(0, 2), st.booleans())
def test_columns_in_bulk_are_rows_one_by_one(
    tokenizer: PreferenceTokenizer,
    kind: pyarrow.DataType,
    rows: list[dict[str, str]],
    start: int,
    has_null: bool,
) -> None:
    names = ("prompt", "chosen", "rejected")
    null = [dict.fromkeys(names)] if has_null else []
    schema = pyarrow.schema([(name, kind) for name in names])
    table = pyarrow.Table.from_pylist([START, *null, *rows, START], schema=schema).slice(start)
    in_bulk, one_by_one = both_ways([table], tokenizer)
    assert in_bulk == one_by_one


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data(), st.sets(st.sampled_from(sorted(NUMBERS))))
def test_values_in_columns_are_those_of_rows_one_by_one(
    tokenizer: PreferenceTokenizer, data: st.DataObject, names: set[str]
) -> None:
    numbers = st.fixed_dictionaries({name: NUMBERS[name] for name in sorted(names)})
    row = st.builds(lambda row, own, note: {**row, **own, "note": note}, ROW, numbers, TEXT)
    rows = data.draw(st.lists(row, max_size=12))
    start = START | {"note": "x"} | dict.fromkeys(names, 1.0)
    table = pyarrow.Table.from_pylist([start, *rows, start])
    in_bulk, one_by_one = both_ways([table], tokenizer)
    assert in_bulk == one_by_one


def test_rows_with_values_make_no_python_objects(
    tokenizer: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {"chosen_score": 3, "rejected_score": 1.5, "weight": 2}
    rows = [START | numbers | {"chosen": f" sat {number % 9}"} for number in range(40)]
    made_rows = counted_rows(monkeypatch)
    store, report = build_store([pyarrow.Table.from_pylist(rows)], tokenizer)
    assert made_rows == [1]
    assert not report.extra_keys
    expected = [[3, None, 1.5, 2], [1.5, None, None, 2]] * len(store)
    np.testing.assert_array_equal(store.values(), np.array(expected, np.float32))


def test_columns_that_are_no_numbers_are_read_row_by_row(tokenizer: PreferenceTokenizer) -> None:
    rows = [START | {"chosen": f" sat {number}", "margin": "1.5"} for number in range(5)]
    twice = [row | {"margin": 1.0, "score_chosen": 3, "chosen_score": 4} for row in rows]
    for table in map(pyarrow.Table.from_pylist, (rows, twice)):
        in_bulk, one_by_one = both_ways([table], tokenizer)
        assert in_bulk == one_by_one
        assert "1.0" in str(in_bulk[0][-1]) or "1.5" in str(in_bulk[0][-1])


def test_other_columns_are_counted_and_those_that_matter_are_read(
    tokenizer: PreferenceTokenizer,
) -> None:
    rows = [START | {"chosen": f" sat {number}", "note": "x"} for number in range(5)]
    for column in ("score", "system"):
        table = pyarrow.Table.from_pylist([row | {column: "good"} for row in rows])
        in_bulk, one_by_one = both_ways([table], tokenizer)
        assert in_bulk == one_by_one


def counted_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the line of each row of a table that becomes a Python object."""
    made_rows: list[int] = []
    row = PlainTable.row

    def counted(table: PlainTable, number: int) -> Any:
        source, _ = found = row(table, number)
        made_rows.append(source.line)
        return found

    monkeypatch.setattr(PlainTable, "row", counted)
    return made_rows


def test_ordinary_rows_make_no_python_objects(
    tokenizer: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [START | {"chosen": f" sat {number % 9}"} for number in range(40)]
    table = pyarrow.Table.from_pylist([*rows, START | {"chosen": " "}])
    made_rows = counted_rows(monkeypatch)
    _, report = build_store([table], tokenizer, max_bad_fraction=1.0)
    assert made_rows == [1, 41]  # the first row decides the kind of the file
    assert (report.kept, report.deduplicated, report.refused) == (9, 31, 1)


def test_only_text_that_is_not_utf8_is_refused(tokenizer: PreferenceTokenizer) -> None:
    rows = [START | {"chosen": f" sat {number}"} for number in range(6)]
    table = pyarrow.Table.from_pylist(rows)
    broken = pyarrow.array([b" a", b" b", b" c", b" \xff", b" d", b" e"]).view(pyarrow.string())
    table = table.set_column(2, "rejected", broken)
    _, report = build_store([table], tokenizer, max_bad_fraction=1.0)
    assert report.refused_by_code == {"E103": 1}
    assert report.kept == 5


def test_an_unreadable_table_stops_at_any_bad_fraction(
    tokenizer: PreferenceTokenizer, tmp_path: Path
) -> None:
    good, cut = tmp_path / "good.parquet", tmp_path / "cut.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([START]), good)
    cut.write_bytes(good.read_bytes()[:-9])
    for message in both_ways([good, cut], tokenizer):
        assert "cut.parquet [E102]" in message
