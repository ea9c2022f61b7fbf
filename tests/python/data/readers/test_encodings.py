"""Files in other encodings, and rows converted by a Python function."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from tokenizers_for_tests import save, with_bos, word_level

from logratio.data import BadDataError, FormatSettings, PreferenceTokenizer, build_store
from logratio.data.formats import FormatSettingsError
from logratio.data.readers import open_inputs
from logratio.data.readers.derived_rows import RowFunction
from logratio.data.readers.inputs import Reading
from logratio.data.records import Refusal
from logratio.data.store import build
from logratio.data.store import ingest as intake_module
from logratio.errors import ConfigError, SettingTypeError

ROW = {"prompt": "the naïve café — €5", "chosen": "“yes”", "rejected": "no…"}
MADE = (" sat on", " dog", " mat")
Row = dict[str, Any]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Write `shop.py` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "shop.py").write_text(text)

    yield write
    sys.modules.pop("shop", None)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreferenceTokenizer:
    return PreferenceTokenizer.load(save(tmp_path / "words", with_bos(word_level())))


def read(path: Path, **reading: Any) -> list[Row | Refusal]:
    return [row for opened in open_inputs(path, Reading(**reading)) for _, row in opened]


def rows_in(kind: str) -> str:
    if kind == "csv":
        return ",".join(ROW) + "\r\n" + ",".join(ROW.values()) + "\r\n"
    line = json.dumps(ROW, ensure_ascii=False)
    return f"[{line},\n{line}]" if kind == "json" else f"{line}\n{line}\n"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-8-sig", "UTF8"])
def test_text_in_another_encoding(tmp_path: Path, kind: str, encoding: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(rows_in(kind).encode(encoding))
    found = read(path, encoding=FormatSettings(encoding=encoding).reading.encoding)
    assert found == [ROW] * (1 if kind == "csv" else 2)


def test_more_text_than_one_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"é{number} " * number} for number in range(600)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for encoding in ("cp1252", "utf-16"):
        path.write_bytes(text.encode(encoding))
        (opened,) = open_inputs(path, Reading(encoding=encoding))
        iterator = iter(opened)
        begun = [next(iterator)[1] for _ in range(250)]
        (rest,) = open_inputs(path, Reading(encoding=encoding))
        rest.resume_from(opened.mark())
        assert begun + [row for _, row in rest] == rows


def test_only_the_undecodable_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"a": "é"}, ensure_ascii=False)
    path.write_bytes(f"{good}\n".encode("cp1252") + b'{"a": "\x81"}\n' + good.encode("cp1252"))
    found = read(path, encoding="cp1252")
    assert [getattr(row, "code", row) for row in found] == [{"a": "é"}, "E103", {"a": "é"}]
    path.write_bytes(f"{good}\n".encode("utf-16") + b"\x00\xd8")  # half a character at the end
    found = read(path, encoding="utf-16")
    assert [getattr(row, "code", row) for row in found] == [{"a": "é"}, "E103"]


def test_without_the_flag_the_refusal_names_it(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "rows.jsonl"
    for encoding, message in (("cp1252", "--encoding cp1252"), ("utf-16", "--encoding utf-16")):
        path.write_bytes(rows_in("jsonl").encode(encoding))
        code, out, _ = run("data", "inspect", path)
        assert code == 1 and message in out.replace("\n", " ")
        code, out, _ = run("data", "inspect", path, "--encoding", encoding)
        assert code == 0 and "naïve café" in out
    code, _, err = run("data", "inspect", path, "--encoding", "klingon")
    assert code == 2 and "unknown text encoding 'klingon'" in err


def test_tables_have_no_encoding(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([ROW]), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", encoding="utf-16") == [ROW]


def shop_row(row: Row) -> Row | list[Row] | None:
    if row["n"] == 1:
        return None
    if row["n"] == 2:
        return [{"prompt": "the cat", "chosen": word, "rejected": " ran"} for word in MADE]
    if row["n"] == 3:
        raise KeyError("nothing here")
    if row["n"] == 4:
        return "text"  # type: ignore[return-value]
    return {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "table"])
def test_a_function_makes_rows(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    rows, given = [{"n": n} for n in range(5)], tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), given)
    data: Any = pyarrow.Table.from_pylist(rows) if kind == "table" else given
    (opened,) = open_inputs(data, Reading(function=RowFunction(shop_row)))
    found = [(source.line, getattr(row, "code", row)) for source, row in opened]
    pair = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}
    assert found[0] == (1, pair)
    assert found[1] == (2, "R316")
    assert found[2:5] == [(3, pair | {"chosen": word}) for word in MADE]
    assert found[5:] == [(4, "E217"), (5, "E217")]


def test_reading_resumes_between_the_rows_derived_from_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in (0, 2, 2, 1)))

    def opened() -> Any:
        return open_inputs(path, Reading(function=RowFunction(shop_row)))[0]

    whole = list(opened())
    assert len(whole) == 8
    for cut in range(len(whole) + 1):
        first, rest = opened(), opened()
        iterator = iter(first)
        begun = [next(iterator) for _ in range(cut)]
        rest.resume_from(json.loads(json.dumps(first.mark())))
        assert begun + list(rest) == whole, cut


def test_every_row_is_accounted_for(
    tmp_path: Path, tokenizer: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in (0, 1, 2, 3)))
    formats = FormatSettings(rows=shop_row)
    with pytest.raises(BadDataError, match=r"rows.jsonl:4 \[E217\].*KeyError: 'nothing here'"):
        build_store(path, tokenizer, formats=formats)
    monkeypatch.setattr(build, "EVERY", 0.0)
    monkeypatch.setattr(intake_module, "BATCH_ROWS", 1)
    store, report = build_store(
        path, tokenizer, tmp_path / "s.store", formats=formats, max_bad_fraction=0.5, resume=True
    )
    assert (report.read, len(store), report.refused_by_code) == (6, 4, {"R316": 1, "E217": 1})
    assert "test_encodings:shop_row" in str(store.metadata)


def test_a_function_by_its_name(module: Callable[[str], None], run: Run, tmp_path: Path) -> None:
    module(
        "def pair(row):\n"
        "    return {'prompt': row['q'], 'chosen': row['good'], 'rejected': row['bad']}\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "u", "good": "a", "bad": "b"}\n')
    code, out, _ = run("data", "inspect", "rows.jsonl", "--rows", "shop:pair")
    assert code == 0 and "through shop:pair" in out and "‹a›" in out.replace("│", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shop", "as module:function"),
        ("shop:nothing", "shop has no function nothing"),
        ("shops:pair", "no module 'shops'"),
        ("shop.py:pair", "name the module, shop"),
        ("needs:pair", "needs missing_library"),
    ],
)
def test_an_unknown_function_name(
    module: Callable[[str], None], run: Run, tmp_path: Path, name: str, message: str
) -> None:
    module("pair = dict\n")
    (tmp_path / "needs.py").write_text("import missing_library\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    code, _, err = run("data", "inspect", "rows.jsonl", "--rows", name)
    assert code == 2 and message in " ".join(err.split()), err


def test_neither_function_nor_name() -> None:
    with pytest.raises(SettingTypeError, match="rows: a int is not a function"):
        FormatSettings(rows=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="as module:function"):
        FormatSettings(rows="pair")
    with pytest.raises(FormatSettingsError, match="klingon"):
        FormatSettings(encoding="klingon")
