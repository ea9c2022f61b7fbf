"""Tables of token ids: written in bulk with the same result as row by row."""

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import save, with_bos, word_level

from logratio._rust import Store
from logratio.data import (
    BadDataError,
    PreferenceTokenizer,
    Refusal,
    Source,
    TokenizationRules,
    TokenizedGroup,
    build_store,
)
from logratio.data.store.id_columns import NAMES

RULES = TokenizationRules(max_length=12, max_prompt_length=6, prompt_truncation="keep_end")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTokenizer:
    folder = save(tmp_path_factory.mktemp("t") / "words", with_bos(word_level()))
    return PreferenceTokenizer.load(folder, RULES)


def groups_of(store: Store) -> list[Any]:
    groups = []
    for number in range(len(store)):
        prompt, ids, masks, roles = store.group(number)
        sides = [(i.tolist(), m.tolist()) for i, m in zip(ids, masks, strict=True)]
        groups.append((prompt.tolist(), sides, roles.tolist()))
    return groups


def table(rows: list[tuple[Any, Any, Any]], kind: pa.DataType) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        {name: pa.array(list(column), kind) for name, column in zip(NAMES, columns, strict=True)}
    )


IDS = st.lists(st.integers(-1, 40), max_size=9)
ROW = st.tuples(IDS, IDS, IDS) | st.tuples(IDS, IDS).map(lambda row: (row[0], row[1], row[1]))


NUMBER = st.none() | st.sampled_from([-1.0, 0.0, 0.5, 3.0, float("inf"), float("nan")])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(ROW, NUMBER, NUMBER, NUMBER, NUMBER), min_size=1, max_size=12),
    are_numbers=st.booleans(),
)
def test_values_in_a_table_are_those_of_json_rows(
    tokenizer: PreferenceTokenizer, rows: list[Any], are_numbers: bool
) -> None:
    names = ("score_chosen", "score_rejected", "margin", "weight")
    kind = pa.float64() if are_numbers else pa.string()
    spelled = [[value if are_numbers or value is None else str(value) for value in row[1:]]
               for row in rows]  # fmt: skip
    whole = table([row[0] for row in rows], pa.list_(pa.int32()))
    for name, column in zip(names, zip(*spelled, strict=True), strict=True):
        whole = whole.append_column(name, pa.array(list(column), kind))
    single = [
        dict(zip((*NAMES, *names), (*ids, *numbers), strict=True))
        for (ids, *_), numbers in zip(rows, spelled, strict=True)
    ]
    in_bulk, one_by_one = _values_of([whole], tokenizer), _values_of([single], tokenizer)
    assert in_bulk == one_by_one


def _values_of(inputs: list[Any], tokenizer: PreferenceTokenizer) -> Any:
    try:
        store, report = build_store(inputs, tokenizer, max_bad_fraction=1.0)
    except BadDataError as error:
        return re.sub(r"<\w+ 0>", "", str(error))
    counts = report.to_dict() | {"places": None, "extra_keys": None, "formats": None}
    return groups_of(store), repr(store.values().tolist()), counts


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=12), large=st.booleans())
def test_a_table_is_read_like_its_rows(
    tokenizer: PreferenceTokenizer, rows: list[Any], large: bool
) -> None:
    ids = pa.large_list(pa.int64()) if large else pa.list_(pa.int32())
    whole = table(rows, ids)
    report, found = _read([whole], tokenizer)
    sources = (Source("<table 0>", line) for line in range(1, len(rows) + 1))
    fitted = [tokenizer.fitting.group(a, b, c, next(sources)) for a, b, c in rows]
    expected: list[Any] = []
    for group in fitted:
        if isinstance(group, TokenizedGroup):
            sides = [(c.ids, c.mask) for c in group.completions]
            entry = (group.prompt_ids, sides, [0, 1])
            if entry not in expected:
                expected.append(entry)
    assert found == expected
    assert report["read"] == len(rows)
    assert report["kept"] == len(expected)
    assert report["read"] == report["kept"] + report["refused"] + report["deduplicated"]
    refused = [group.code for group in fitted if isinstance(group, Refusal)]
    assert report["refused_by_code"] == {code: refused.count(code) for code in sorted(set(refused))}


def _read(inputs: list[Any], tokenizer: PreferenceTokenizer) -> tuple[dict[str, Any], list[Any]]:
    try:
        store, report = build_store(inputs, tokenizer, max_bad_fraction=1.0)
    except BadDataError as error:
        assert "no row was kept" in error.summary
        counts = dict.fromkeys(("read", "kept", "refused", "deduplicated"), 0)
        return _counts_of(str(error), counts), []
    return report.to_dict(), groups_of(store)


def _counts_of(text: str, counts: dict[str, Any]) -> dict[str, Any]:
    numbers = re.findall(r"\d+", text.splitlines()[1])
    found: dict[str, Any] = dict(zip(counts, map(int, numbers), strict=False))
    codes = re.findall(r"^\[(\w+)\] (\d+)", text, re.MULTILINE)
    found["refused_by_code"] = {code: int(count) for code, count in codes if code[0] in "ER"}
    return found


def test_slices_nulls_and_other_columns(tokenizer: PreferenceTokenizer) -> None:
    rows = [([7, 8], [9], [10, 11]), ([7], [12], [13]), (None, [9], [10]), ([8], [14], [15])]
    whole = table(rows, pa.list_(pa.int32())).append_column("id", pa.array(["a", "b", "c", "d"]))
    store, report = build_store([whole.slice(1)], tokenizer, max_bad_fraction=1.0)
    assert [group[0] for group in groups_of(store)] == [[7], [8]]
    assert report.refused_by_code == {"R305": 1}
    assert report.extra_keys == {"id": 3}
    assert store.sources()[1].tolist() == [1, 3]


@pytest.mark.parametrize(
    "column", [pa.array([["a"], ["b"]]), pa.array([1, 2]), pa.array([[1.0], [2.0]])]
)
def test_columns_that_hold_no_ids_are_refused(
    tokenizer: PreferenceTokenizer, column: pa.Array
) -> None:
    ids = pa.array([[7], [8]], pa.list_(pa.int32()))
    report, _ = _read([pa.table([ids, ids, column], names=list(NAMES))], tokenizer)
    assert report["refused_by_code"] == {"E203": 2}


def test_ids_in_json_lines_are_read_too(tokenizer: PreferenceTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text(
        '{"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10]}\n'
        '{"prompt": "the", "chosen": "cat", "rejected": "dog"}\n'
        '{"prompt_ids": [7], "chosen_ids": [9, true], "rejected_ids": [10]}\n'
        '{"prompt_ids": [7], "chosen_ids": [9, 99999], "rejected_ids": [10]}\n'
    )
    store, report = build_store([path], tokenizer, max_bad_fraction=1.0)
    assert groups_of(store)[0] == ([7, 8], [([9], [1]), ([10], [1])], [0, 1])
    assert store.sources()[1].tolist() == [1, 2]
    assert report.refused_by_code == {"E203": 1, "E601": 1}
    assert report.formats["token ids"] == 3


def test_no_python_object_is_made_for_a_row(tokenizer: PreferenceTokenizer) -> None:
    count = 50_000
    prompt = pa.ListArray.from_arrays(
        np.arange(0, 3 * count + 1, 3, dtype=np.int32),
        pa.array(np.tile([7, 8, 9], count), pa.int32()),
    )
    sides = [
        pa.ListArray.from_arrays(
            np.arange(0, 2 * count + 1, 2, dtype=np.int32),
            pa.array(
                np.stack((np.full(count, side), np.arange(count) % 7 + 10), 1).ravel(), pa.int32()
            ),
        )
        for side in (10, 11)
    ]
    whole = pa.table([prompt, *sides], names=list(NAMES))
    gc.collect()
    before = len(gc.get_objects())
    _, report = build_store([whole], tokenizer)
    assert report.read == count
    assert report.kept == 7
    assert len(gc.get_objects()) - before < 500
