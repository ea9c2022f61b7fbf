"""JSON lines: every kind of damage is reported with its line."""

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logratio.data.readers import open_file
from logratio.data.records import CODES, Refusal, Source

GOOD = b'{"prompt": "p", "chosen": "a", "rejected": "b"}'
BROKEN = {
    "malformed": (b'{"prompt": "p" "chosen": 1}', "E101", 16),
    "no JSON": (b"hello", "E101", 1),
    "unquoted": (b'{"prompt": p}', "E101", 12),
    "long number": (b'{"prompt": ' + b"1" * 5000 + b"}", "E101", None),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "E101", None),
    "not UTF-8": (b'{"prompt": "\xff"}', "E103", 13),
    "surrogate bytes": (b'{"prompt": "\xed\xa0\x80"}', "E103", 13),
    "surrogate": (rb'{"prompt": "\ud800"}', "E104", None),
    "surrogate in a key": (rb'{"a": {"\udfff": 1}}', "E104", None),
    "too long": (b'{"prompt": "' + b"x" * 300_000 + b'"}', "E107", None),
    "string": (b'"text"', "E203", None),
    "null": (b"null", "E203", None),
    "key twice": (b'{"prompt": "p", "prompt": "q"}', "E205", None),
    "inner key twice": (b'{"prompt": [{"role": "user", "role": "x"}]}', "E205", None),
}

Write = Callable[[bytes], Path]


@pytest.fixture(params=["plain", "gz"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Write a file, plain or compressed."""

    def write(content: bytes) -> Path:
        path = tmp_path / f"data.jsonl{'.gz' if request.param == 'gz' else ''}"
        path.write_bytes(gzip.compress(content) if request.param == "gz" else content)
        return path

    return write


def refusals(path: Path) -> list[Refusal]:
    return [row for _, row in open_file(path, max_line_bytes=250_000) if isinstance(row, Refusal)]


def rows(path: Path) -> list[tuple[int, object]]:
    return [(source.line, row) for source, row in open_file(path)]


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_line_is_named_and_the_others_are_read(
    write: Write, fault: str, place: int
) -> None:
    content, code, column = BROKEN[fault]
    lines = [GOOD, GOOD]
    lines.insert(place - 1, content)
    path = write(b"\n".join(lines) + b"\n")
    reader = open_file(path, max_line_bytes=250_000)
    read = list(reader)
    assert [source.line for source, _ in read] == [1, 2, 3]
    (refusal,) = (row for _, row in read if isinstance(row, Refusal))
    assert (refusal.source, refusal.code, refusal.column) == (
        Source(path.as_posix(), place),
        code,
        column,
    )
    at = f"{path.as_posix()}:{place}" + (f":{column}" if column else "")
    assert str(refusal).startswith(f"{at} [{code}] ")
    assert refusal.stops
    assert reader.position == reader.size == path.stat().st_size


def test_every_truncation_of_the_last_line_is_e102(write: Write) -> None:
    last = '{"prompt": "p é", "chosen": [{"role": "user"}], "rejected": true}'.encode()
    for end in range(1, len(last)):
        (refusal,) = refusals(write(GOOD + b"\n" + last[:end]))
        assert (refusal.code, refusal.source.line) == ("E102", 2), last[:end]
    assert not refusals(write(GOOD + b"\n" + last))


def test_malformed_last_line_that_was_not_cut(write: Write) -> None:
    (refusal,) = refusals(write(GOOD + b'\n{"prompt" "p"}'))
    assert refusal.code == "E101"


def test_cut_compressed_data(tmp_path: Path) -> None:
    lines = b"".join(b'{"prompt": "%d"}\n' % i for i in range(5000))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-2000])
    *sound, (line, refusal) = rows(path)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.source.line) == ("E102", line)
    assert [row for _, row in sound] == [{"prompt": str(i)} for i in range(line - 1)]


@pytest.mark.parametrize("position", [30, -6])
def test_damaged_compressed_data(tmp_path: Path, position: int) -> None:
    content = bytearray(gzip.compress(GOOD + b"\n"))
    content[position] ^= 0xFF
    path = tmp_path / "damaged.jsonl.gz"
    path.write_bytes(content)
    assert [refusal.code for refusal in refusals(path)] == ["E108"]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\r\n \n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"]
)
def test_empty_file(write: Write, content: bytes) -> None:
    (refusal,) = refusals(path := write(content))
    assert (refusal.code, str(refusal.source)) == ("E106", path.as_posix())


def test_array_after_too_many_blank_lines(write: Write) -> None:
    (refusal,) = refusals(write(b"\n" * 5000 + b"[" + GOOD + b"]"))
    assert (refusal.code, refusal.source.line) == ("E105", 5001)


def test_mark_crlf_and_blank_lines_are_accepted(write: Write) -> None:
    path = write(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD + b"  \r\n" + GOOD)
    reader = open_file(path)
    assert [(source.line, row) for source, row in reader] == [
        (line, json.loads(GOOD)) for line in (1, 4, 5)
    ]
    assert reader.blank_lines == 2


def test_surrogate_pairs_in_escapes_are_accepted(write: Write) -> None:
    assert rows(write(rb'{"prompt": "\ud83d\ude00 \\ud800"}')) == [(1, {"prompt": "😀 \\ud800"})]


def test_compression_is_detected_from_content(tmp_path: Path) -> None:
    plain, compressed = tmp_path / "plain.jsonl.gz", tmp_path / "compressed.jsonl"
    plain.write_bytes(GOOD)
    compressed.write_bytes(gzip.compress(GOOD))
    assert rows(plain) == rows(compressed) == [(1, json.loads(GOOD))]


def test_line_at_the_limit_is_read(write: Write) -> None:
    path = write(GOOD + b"\n" + GOOD)
    assert len(list(open_file(path, max_line_bytes=len(GOOD)))) == 2
    codes = [getattr(row, "code", None) for _, row in open_file(path, max_line_bytes=len(GOOD) - 1)]
    assert codes == ["E107", "E107"]


def test_memory_does_not_grow_with_file_or_line(write: Write) -> None:
    path = write((GOOD + b"\n") * 20_000 + b"x" * 20_000_000 + b"\n" + GOOD)
    tracemalloc.start()
    count = sum(1 for _ in open_file(path, max_line_bytes=100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_002
    assert peak < 6_000_000


def test_missing_unreadable_and_folder_are_plain_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        open_file(tmp_path / "absent.jsonl")
    with pytest.raises(IsADirectoryError, match="name the files in it"):
        open_file(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_refusals_with_a_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "any.jsonl"
    path.write_bytes(content)
    for source, row in open_file(path):
        assert isinstance(row, dict) or (row.code in CODES and row.source == source)
