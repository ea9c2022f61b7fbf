"""Every container yields the same rows, resumes at any mark, and reports damage."""

import copy
import gzip
import json
import os
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import duckdb
import polars
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from containers import ENCODE, FILES, PACK, TABLES, json_lines, parquet
from piped import piped

from logratio.data.readers import Row, Rows, as_inputs, open_file, open_inputs
from logratio.data.records import Refusal, Source

ROWS: list[Row] = [
    {"prompt": f"p {i}é\n", "chosen": 'a "quoted", one' * i, "rejected": f"b{i}"} for i in range(7)
]
CHAT: list[Row] = [
    {"prompt": [{"role": "user", "content": f"u{i}"}], "chosen": [], "score": {"a": i}}
    for i in range(3)
]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Replace stdin by bytes."""

    def put(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", piped(content))

    return put


def write(folder: Path, kind: str, pack: str, rows: list[Row], name: str = "data") -> Path:
    path = folder / f"{name}.{kind}{pack}"
    path.write_bytes(PACK[pack](ENCODE[kind](rows)))
    return path


def values(rows: Rows) -> list[Row | Refusal]:
    return [row for _, row in rows]


def codes(rows: Rows) -> list[str]:
    return [row.code for _, row in rows if isinstance(row, Refusal)]


@pytest.mark.parametrize(("kind", "pack"), FILES)
@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
def test_every_container_holds_the_rows(
    tmp_path: Path, kind: str, pack: str, rows: list[Row]
) -> None:
    path = write(tmp_path, kind, pack, rows)
    opened = open_file(path)
    read = list(opened)
    expected = rows
    if kind == "csv" and rows is CHAT:
        texts = ("prompt", "chosen", "score")
        expected = [row | {name: json.dumps(row[name]) for name in texts} for row in rows]
    assert [row for _, row in read] == expected
    assert {source.file for source, _ in read} == {path.as_posix()}
    assert opened.position == opened.size == path.stat().st_size
    assert list(opened) == read, "a file can be read again"
    assert opened.kind.endswith({"": "", ".gz": ", gzip", ".zst": ", zstd"}[pack])


@pytest.mark.parametrize(("kind", "pack"), FILES)
def test_stdin_is_detected_from_its_first_bytes(
    kind: str, pack: str, stdin: Callable[[bytes], None]
) -> None:
    stdin(PACK[pack](ENCODE[kind](ROWS)))
    (opened,) = open_inputs(["-"])
    assert values(opened) == ROWS
    assert (opened.name, opened.size) == ("stdin", None)
    assert opened.position > 0
    with pytest.raises(OSError, match=r"only once.*stdin"):
        list(opened)


@pytest.mark.parametrize(("kind", "pack"), FILES)
@pytest.mark.parametrize("tail", ["", "broken"])
def test_resuming_at_every_row_gives_the_rest(
    tmp_path: Path, kind: str, pack: str, tail: str
) -> None:
    path = write(tmp_path, kind, pack, ROWS)
    if tail:
        content = ENCODE[kind](ROWS)
        path.write_bytes(PACK[pack](content[: -len(content) // 9]))
    whole = list(open_file(path))
    opened = open_file(path)
    marks = [opened.mark()] + [opened.mark() for _ in opened]
    marks.append(opened.mark())
    for number, mark in enumerate(marks):
        again = open_file(path)
        again.resume_from(json.loads(json.dumps(mark)))
        assert list(again) == whole[number:], number
        assert list(again) == whole[number:], "it goes on there whenever it is iterated"


@pytest.mark.parametrize("kind", TABLES)
def test_resuming_at_every_batch_gives_the_rest(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, "", ROWS)
    opened = open_file(path)
    read = [(first, batch.to_pylist(), opened.mark()) for first, batch in opened.batches()]
    assert [first for first, _, _ in read] == [1, 4, 7]
    assert [row for _, rows, _ in read for row in rows] == ROWS
    for first, rows, mark in read:
        opened.resume_from(mark)
        assert values(opened) == ROWS[first - 1 + len(rows) :]


def test_row_containers_have_no_columns(tmp_path: Path) -> None:
    opened = open_file(write(tmp_path, "jsonl", "", ROWS))
    assert opened.columns() is None
    with pytest.raises(TypeError, match="JSON lines has rows and no columns"):
        opened.batches()
    assert open_file(write(tmp_path, "parquet", "", ROWS)).columns() == tuple(ROWS[0])


def stream_of(table: pyarrow.Table) -> pyarrow.RecordBatchReader:
    return table.to_reader(max_chunksize=2)


TABLE = pyarrow.Table.from_pylist(ROWS)
MAKE_TABLE: dict[str, Callable[[], Any]] = {
    "pyarrow": lambda: TABLE,
    "pyarrow reader": lambda: stream_of(TABLE),
    "polars": lambda: polars.DataFrame(ROWS),
    "pandas": lambda: datasets.Dataset.from_list(ROWS).to_pandas(),
    "duckdb": lambda: duckdb.from_arrow(TABLE).select("*"),
    "datasets": lambda: datasets.Dataset.from_list(ROWS),
    "datasets selected": lambda: datasets.Dataset.from_list(ROWS[::-1]).select(range(6, -1, -1)),
    "datasets iterable": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "datasets generated": lambda: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
    "one split": lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
}


@pytest.mark.parametrize("make", MAKE_TABLE)
def test_tables_in_memory(make: str) -> None:
    first, opened = open_inputs([TABLE, MAKE_TABLE[make]()])
    assert opened.columns() == tuple(ROWS[0])
    marks = []
    read = []
    for source, row in opened:
        read.append((source, row))
        marks.append(opened.mark())
    assert read == [(Source("<table 1>", i), row) for i, row in enumerate(ROWS, 1)]
    assert opened.size in (None, len(ROWS))
    assert opened.position == len(ROWS)
    for number, mark in enumerate(marks, 1):
        (again,) = open_inputs([MAKE_TABLE[make]()])
        again.resume_from(mark)
        assert values(again) == ROWS[number:]
    assert sum(len(batch) for _, batch in first.batches()) == len(ROWS)


def test_batches_of_a_large_table_are_small_and_not_copied() -> None:
    numbers = pyarrow.array(range(100_000))
    (opened,) = open_inputs([pyarrow.table({"n": numbers})])
    batches = list(opened.batches())
    assert [first for first, _ in batches] == list(range(1, 100_000, 8192))
    assert max(len(batch) for _, batch in batches) == 8192
    assert batches[1][1]["n"].buffers()[1].address == numbers.buffers()[1].address


def test_a_column_is_not_a_table() -> None:
    with pytest.raises(TypeError, match="has no columns: give a table"):
        open_inputs([pyarrow.chunked_array([["a"]])])[0].columns()


@pytest.mark.parametrize("first", ['{\n"prompt": "a"\n}', '{"data": [\n{}]}'])
def test_an_object_over_several_lines_is_explained(tmp_path: Path, first: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(first)
    _, refusal = next(iter(open_file(path)))
    assert isinstance(refusal, Refusal)
    assert "write each object on one line" in refusal.reason


def test_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with tarfile.open(tmp_path / "rows.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "rows.jsonl")
    ((_, refusal),) = open_file(tmp_path / "rows.tar.gz")
    assert "a tar archive" in str(refusal)


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    with pytest.raises(OSError, match="Named twice"):
        open_inputs([path, str(path)])


def test_an_input_that_is_not_data_is_refused() -> None:
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)
    )
    with pytest.raises(TypeError, match="with the splits 'train', 'test': pass one of them"):
        open_inputs([splits])
    with pytest.raises(TypeError, match="item 1 of the list is a list: give paths, '-' for stdin"):
        open_inputs([[["a"]]])


@pytest.mark.parametrize("rows", [ROWS, CHAT, tuple(CHAT)], ids=["text", "chat", "tuple"])
def test_a_list_of_dicts_is_one_input(rows: list[Row]) -> None:
    (alone,) = open_inputs(rows)
    _, opened = open_inputs([TABLE, rows])
    expected = [(Source("<table 1>", i), row) for i, row in enumerate(rows, 1)]
    assert list(opened) == list(opened) == expected
    assert values(alone) == list(rows)
    assert (opened.size, opened.position, opened.columns()) == (len(rows), len(rows), None)
    for number, _ in enumerate(alone, 1):
        mark = alone.mark()
        (again,) = open_inputs(rows)
        again.resume_from(mark)
        assert values(again) == list(rows[number:])


def test_rows_of_a_list_are_neither_changed_nor_copied_with_settings() -> None:
    rows = [dict(row) for row in ROWS]
    (listed,) = as_inputs(rows)
    assert as_inputs([listed]) == [listed]
    assert copy.deepcopy(listed) is listed
    assert json.dumps([listed], default=str) == '["<7 rows in memory>"]'
    for _, row in open_inputs([listed])[0]:
        assert isinstance(row, dict)
        row.clear()
    assert rows == ROWS


@pytest.mark.parametrize("kind", ENCODE)
def test_truncated_files_are_always_detected(tmp_path: Path, kind: str) -> None:
    content = ENCODE[kind](ROWS[:3])
    path = tmp_path / f"cut.{kind}"
    for length in range(1, len(content) - 1):
        path.write_bytes(content[:length])
        found = codes(open_file(path))
        if kind in (
            "jsonl",
            "csv",
        ):  # truncation between records, or in the last unquoted cell, cannot be detected
            rows = len(values(open_file(path))) - len(found)
            assert found or rows < 3 or length > len(content) - 5, length
        else:
            assert found, length
            assert set(found) <= {"E102", "E108", "E106", "E101"}, (length, found)


@pytest.mark.parametrize("pack", [".gz", ".zst"])
def test_compressed_files_of_several_members(tmp_path: Path, pack: str) -> None:
    content = json_lines(ROWS)
    path = tmp_path / f"data.jsonl{pack}"
    path.write_bytes(b"".join(PACK[pack](content[i : i + 50]) for i in range(0, len(content), 50)))
    assert values(open_file(path)) == ROWS
    path.write_bytes(PACK[pack](content)[:-3])
    assert "E102" in codes(open_file(path))
    path.write_bytes(PACK[pack](content) + b"no member")
    assert codes(open_file(path))[-1:] == ["E108"]


@pytest.mark.parametrize("kind", TABLES)
def test_damaged_tables_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, "", ROWS)
    content = bytearray(path.read_bytes())
    content[5 if kind == "arrows" else 0] ^= 0xFF
    path.write_bytes(content)
    opened = open_file(path)
    ((source, refusal),) = opened
    assert isinstance(refusal, Refusal)
    assert (refusal.code, str(source)) == ("E108", path.as_posix())
    assert "Traceback" not in refusal.reason
    assert "\n" not in refusal.reason


def test_batches_of_damaged_and_empty_tables_are_refusals(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", "", ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    ((line, refusal),) = open_file(path).batches()
    assert line == 0
    assert "data.parquet [E102] the file ends before" in str(refusal)
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(TABLE.slice(0, 0), empty)
    ((_, refusal),) = open_file(empty).batches()
    assert refusal.code == "E106"
    assert codes(open_file(empty)) == ["E106"]


def test_two_columns_with_one_name(tmp_path: Path) -> None:
    (opened,) = open_inputs([pyarrow.table([[1], [2]], names=["a", "a"])])
    assert codes(opened) == ["E113"]
    path = tmp_path / "twice.csv"
    path.write_text("a,b,a\n1,2,3\n")
    assert codes(open_file(path)) == ["E113"]


@pytest.mark.parametrize("kind", TABLES)
def test_rows_that_are_too_long(tmp_path: Path, kind: str) -> None:
    rows = [{"a": "x"}, {"a": "y" * 5000}, {"a": "z"}]
    opened = open_file(write(tmp_path, kind, "", rows), max_line_bytes=4000)
    assert [getattr(row, "code", row) for row in values(opened)] == [rows[0], "E107", rows[2]]
    batches = list(opened.batches())
    assert [first for first, _ in batches] == [1, 2, 3]
    assert [getattr(batch, "code", None) for _, batch in batches] == [None, "E107", None]


def test_invalid_utf8_in_a_table() -> None:
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"),
                              pyarrow.py_buffer(b"a\xffb")]
    )  # fmt: skip
    (opened,) = open_inputs([pyarrow.table({"a": text})])
    assert [getattr(row, "code", row) for row in values(opened)] == [{"a": "a"}, "E103", {"a": "b"}]


def array(tmp_path: Path, text: str, limit: int = 1000) -> list[tuple[int, Any]]:
    path = tmp_path / "data.json"
    path.write_text(text)
    rows = open_file(path, max_line_bytes=limit)
    return [(source.line, getattr(row, "code", row)) for source, row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", [(0, "E106")]),
        (' [ {"a": "]}\\"{"}\n,\n\n{"b": [1]} ] \n', [(1, {"a": ']}"{'}), (4, {"b": [1]})]),
        ('[{"a": 1},\n{"a" 2},\n{"a": 3}]', [(1, {"a": 1}), (2, "E101"), (3, {"a": 3})]),
        ('[{"a": 1},, {"a": 2}]', [(1, {"a": 1}), (1, "E101"), (1, {"a": 2})]),
        ('[{"a": 1},]', [(1, {"a": 1}), (1, "E101")]),
        ("[,{}]", [(1, "E101"), (1, {})]),
        ('[{"a": 1} {"b": 1}]', [(1, "E101")]),
        ('[1, "a", [2], null, {}]', [*[(1, "E203")] * 4, (1, {})]),
        ('[{"a": 1, "a": 2}, {}]', [(1, "E205"), (1, {})]),
        ('[{"a": "\\ud800"}, {}]', [(1, "E104"), (1, {})]),
        ("[{}]\n{}", [(1, {}), (2, "E109")]),
        ('[{}\n, {"a": [}, {}]', [(1, {}), (2, "E109")]),
        ('[{}, {"a": 1\n, {}]', [(1, {}), (1, "E109")]),
        ('[{}, {"a": "1}, {}]', [(1, {}), (1, "E102")]),
        ("[{},\n", [(1, {}), (2, "E102")]),
        ('[{}, {"a": "' + "x" * 2000 + '"}, {}]', [(1, {}), (1, "E109")]),
        ("[" * 20_000, [(1, "E109")]),
    ],
)
def test_arrays(tmp_path: Path, text: str, expected: list[tuple[int, Any]]) -> None:
    assert array(tmp_path, text, 1000 if "x" in text else 100_000) == expected


def test_column_of_a_fault_in_an_array(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{},\n {"a" 1}, {"a":\n 1,, 2}]')
    first, second = (row for row in values(open_file(path)) if isinstance(row, Refusal))
    assert str(first).startswith(f"{path.as_posix()}:2:7 [E101] malformed JSON: Expecting ':'")
    assert str(second).startswith(f"{path.as_posix()}:2 [E101]")
    assert "(line 2 of the record, column 4)" in second.reason


def records(tmp_path: Path, text: str | bytes) -> list[tuple[int, Any]]:
    path = tmp_path / "data.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = open_file(path, max_line_bytes=1000)
    return [(source.line, getattr(row, "code", row)) for source, row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [(0, "E106")]),
        ("a,b\n", [(0, "E106")]),
        ("\ufeffa, b\r\n\r\n1,\r\n", [(3, {"a": "1", "b": ""})]),
        ("a\tb\n1,2\t\n", [(2, {"a": "1,2", "b": ""})]),
        ("a;b\n1,2;\n", [(2, {"a": "1,2", "b": ""})]),
        (",b\n0,x\n", [(2, {"column 1": "0", "b": "x"})]),
        (
            'a,b\n"1\n\n2",x\n3,"y""z"',
            [(2, {"a": "1\n\n2", "b": "x"}), (5, {"a": "3", "b": 'y"z'})],
        ),
        ("a,b\n1\n2,3\n4,5,6\n", [(2, "E110"), (3, {"a": "2", "b": "3"}), (4, "E110")]),
        ("a,b\n1,2\n3", [(2, {"a": "1", "b": "2"}), (3, "E102")]),
        ('a,b\n1,2\n"3,4\n', [(2, {"a": "1", "b": "2"}), (3, "E102")]),
        ('a,b\n"1"x,2\n3,4\n', [(2, "E111")]),
        ('a,b\n1,2\n"' + "x\n" * 1000, [(2, {"a": "1", "b": "2"}), (3, "E111")]),
        (b"a,b\n1,\xff\n3,4\n", [(2, "E103"), (3, {"a": "3", "b": "4"})]),
        (b"a,\xff\n1,2\n", [(1, "E111")]),
        (
            'a,b\n"[1, ""x""]","{""k"": {}}"\n"[not, JSON]",{1}\n',
            [
                (2, {"a": '[1, "x"]', "b": '{"k": {}}'}),
                (3, {"a": "[not, JSON]", "b": "{1}"}),
            ],
        ),
    ],
)
def test_csv(tmp_path: Path, text: str | bytes, expected: list[tuple[int, Any]]) -> None:
    assert records(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (b"prompt,chosen\na,b\n", "data", {"prompt": "a", "chosen": "b"}),
        (b"prompt,chosen\na,b\n", "data.txt", {"prompt": "a", "chosen": "b"}),
        (b"prompt;chosen\na;b\n", "data", {"prompt": "a", "chosen": "b"}),
        (b"prompt,chosen\na,b\n", "data.jsonl", "E101"),
        (b"Hello, how are you?\n", "data", "E101"),
        (b"hello\n", "data", "E101"),
        (b'{"a": 1}\n', "data.parquet", "E108"),
        (b"\0\1\2", "data.jsonl.gz", "E108"),
        (b"PK\x03\x04abc", "data.jsonl", "E112"),
        (b"\xff\xfea\0", "data.csv", "E112"),
        (b"LRSTORE2", "pairs.store", "E112"),
        (b"version https://git-lfs.github.com/spec/v1\n", "data.parquet", "E112"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "data.jsonl.gz", "E112"),
        (gzip.compress(parquet(ROWS), mtime=0), "data.parquet.gz", "E112"),
    ],
)
def test_containers_are_detected_from_content(
    tmp_path: Path, content: bytes, name: str, expected: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    row = values(open_file(tmp_path / name))[0]
    assert getattr(row, "code", row) == expected


def test_folders_are_their_data_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    for kind, name in (("csv", "b"), ("jsonl", "a"), ("parquet", "inner/c")):
        (folder / "inner").mkdir(parents=True, exist_ok=True)
        write(folder, kind, "", ROWS, name)
    for other in ("README.md", "LICENSE", ".hidden", "_SUCCESS", "dataset_info.json"):
        (folder / other).write_text("x")
    opened = open_inputs([folder, str(write(tmp_path, "jsonl", "", ROWS, "d"))])
    assert [Path(rows.name).name for rows in opened] == [
        "a.jsonl", "b.csv", "c.parquet", "d.jsonl"
    ]  # fmt: skip
    assert opened.inputs == [0, 0, 0, 1]
    assert len(opened.left_out) == 5
    (folder / "weights.bin").write_bytes(b"")
    with pytest.raises(OSError, match=r"unknown type \(weights\.bin\); name the files to read"):
        open_inputs([folder])


def test_folders_without_data_or_with_several_splits(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Holds no data file"):
        open_inputs([tmp_path])
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)
    )
    splits.save_to_disk(tmp_path / "sets")
    with pytest.raises(
        OSError, match=r"several splits; choose one with formats.split train, or name its files"
    ):
        open_inputs([tmp_path / "sets"])
    opened = open_inputs([tmp_path / "sets" / "train"])
    assert [row for rows in opened for _, row in rows] == ROWS


def test_missing_unreadable_and_twice(tmp_path: Path, stdin: Callable[[bytes], None]) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        open_inputs([tmp_path / "absent.csv"])
    stdin(b"{}\n")
    with pytest.raises(OSError, match=r"Can be read only once.*stdin"):
        open_inputs(["-", Path("-")])


@pytest.mark.parametrize("kind", ENCODE)
def test_named_pipes_are_read_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content = ENCODE[kind](ROWS)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(path.write_bytes, content)
        opened = open_file(path)
        assert values(opened) == ROWS
        assert written.result() == len(content)
    assert (opened.name, opened.size) == (path.as_posix(), None)
    with pytest.raises(OSError, match="only once"):
        list(opened)


def test_pyarrow_is_imported_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, table = write(tmp_path, "jsonl", ".zst", ROWS), write(tmp_path, "parquet", "", ROWS)
    plain = write(tmp_path, "jsonl", ".gz", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert values(open_file(plain)) == ROWS
    for path in (packed, table):
        with pytest.raises(ImportError, match="cannot be read without pyarrow: pip install pyarr"):
            open_file(path)


HELD = [{"prompt": f"p{n}", "chosen": "a", "rejected": ["b", {"c": n}]} for n in range(3)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", ["data", "rows", "train"])
@pytest.mark.parametrize("padding", [0, 10_000], ids=["short", "beyond the head"])
def test_an_object_that_holds_the_rows_is_read(
    tmp_path: Path, indent: int | None, key: str, padding: int
) -> None:
    rows = [{**row, "chosen": "a" * (padding + 1)} for row in HELD]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({key: rows}, indent=indent) + "\n")
    (opened,) = open_inputs([path])
    assert opened.kind == "JSON array"
    assert [row for _, row in opened] == rows
    (opened,) = open_inputs([path])
    iterator = iter(opened)
    next(iterator)
    mark = opened.mark()
    (again,) = open_inputs([path])
    again.resume_from(mark)
    assert [row for _, row in again] == rows[1:]


@pytest.mark.parametrize("padding", [0, 10_000], ids=["short", "beyond the head"])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_that_begin_like_such_an_object_are_still_rows(
    tmp_path: Path, count: int, padding: int
) -> None:
    row = {
        "prompt": [{"role": "user", "content": "a" * padding}],
        "chosen": [{"role": "assistant", "content": "b"}],
    }
    others = [
        row,
        {"steps": [{"text": "a" * padding}], "label": True},
        {"data": [{"a": 1}], "b": 2},
    ]
    for number, one in enumerate(others):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for _ in range(count)))
        (opened,) = open_inputs([path])
        assert [found for _, found in opened] == [one] * count


def test_what_follows_the_rows_in_their_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": HELD, "version": "1"}, indent=1))
    (opened,) = open_inputs([path])
    *rows, (_, fault) = opened
    assert len(rows) == 3
    assert isinstance(fault, Refusal)
    assert fault.code == "E109"
    assert "something follows the list of rows" in fault.reason
