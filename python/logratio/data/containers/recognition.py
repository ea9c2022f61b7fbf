"""What a file holds: told by its first bytes, and by its name only where bytes cannot tell."""

import codecs
import csv
import json
import re
from pathlib import PurePath

from logratio.data.containers.arrow_rows import ARROW_MAGIC, STREAM_MAGIC
from logratio.data.containers.csv_records import delimiter_of
from logratio.data.containers.json_array import HOLDS_ROWS
from logratio.data.containers.parquet_rows import PARQUET_MAGIC
from logratio.data.containers.rows import SPACE
from logratio.data.containers.sources import ByteSource
from logratio.data.records import InvalidRecordError

JSON_LINES, JSON_ARRAY, CSV = "JSON lines", "JSON array", "CSV"
PARQUET, ARROW_FILE, ARROW_STREAM = "Parquet", "Arrow file", "Arrow stream"

PACKED_SUFFIXES = {".gz", ".zst", ".zstd"}
KIND_OF_SUFFIX = {
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON_LINES,
    ".csv": CSV,
    ".tsv": CSV,
    ".parquet": PARQUET,
    ".arrow": ARROW_FILE,
    ".feather": ARROW_FILE,
    ".ipc": ARROW_FILE,
    ".arrows": ARROW_STREAM,
}
"""By the last suffix of a name that tells what is in a file, once that of a packer is off."""

_ROW_A_LINE = {".jsonl", ".ndjson"}

_MAGIC = {PARQUET_MAGIC: PARQUET, ARROW_MAGIC: ARROW_FILE, STREAM_MAGIC: ARROW_STREAM}
_UNREAD = {
    b"PK\x03\x04": "a ZIP archive",
    b"\xfd7zXZ\x00": "packed with xz",
    b"BZh": "packed with bzip2",
    b"\x1f\x8b": "packed with gzip, twice",
    b"\x28\xb5\x2f\xfd": "packed with zstd, twice",
    b"PARE": "an encrypted Parquet file",
    b"FEA1": "a Feather file of version 1",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer, and not the file itself (git lfs pull)",
}
STORE_MAGIC = b"LRSTORE"
_STORE_USES = (
    "ids and no rows: `logratio data report` and `data verify` say what is in it, and train, "
    "precompute and evaluate read it alone"
)
_OF_MESSAGES = {b"role", b"content", b"from", b"value", b"name", b"type"}
"""First keys of a message, and of other objects inside of a row."""
_HOLDERS = {
    *(b"data", b"rows", b"examples", b"instances", b"items", b"records", b"entries", b"samples"),
    *(b"train", b"validation", b"test", b"dataset"),
}
_TABLES = {PARQUET, ARROW_FILE, ARROW_STREAM}
_COLUMN_NAME = re.compile(r"[\w .-]{0,64}")


def suffix(name: str) -> str:
    """Return the suffix that tells what is in a file: of "a.csv.gz" it is ".csv"."""
    path = PurePath(name)
    if path.suffix.lower() in PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def is_table(source: ByteSource) -> bool:
    """Say whether a source holds columns of Parquet or Arrow, and no text."""
    return any(source.head.startswith(magic) for magic in _MAGIC)


def recognised(source: ByteSource) -> str:
    """Return the kind of a source's container.

    Raises:
        InvalidRecordError: E108 where the first bytes are not those of what the name promises,
            E112 where it is of a kind that is not read.
    """
    head, named = source.head, KIND_OF_SUFFIX.get(suffix(source.name))
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            if kind == PARQUET and source.packing:
                raise InvalidRecordError("E112", f"Parquet inside {source.packing}: unpack it")
            return kind
    if unread := _unread(head):
        raise InvalidRecordError("E112", f"it is {unread}")
    if named in _TABLES and head:
        raise InvalidRecordError("E108", f"it is named as {named}, and does not begin like one")
    if _is_packed_and_damaged(source):
        raise InvalidRecordError("E108", "it is named as packed, and does not begin like that")
    return _text_kind(head, suffix(source.name))


def _unread(head: bytes) -> str | None:
    """Say what a file is of which no rows are read, and what to do."""
    for magic, what in _UNREAD.items():
        if head.startswith(magic):
            return f"{what}, which is not read"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "text in UTF-16: give --encoding utf-16"
    if head[257:262] == b"ustar":
        return "a tar archive, which is not read: unpack it"
    return f"a sealed store, {_STORE_USES}" if head.startswith(STORE_MAGIC) else None


def _is_packed_and_damaged(source: ByteSource) -> bool:
    is_named = PurePath(source.name).suffix.lower() in PACKED_SUFFIXES
    return is_named and not source.packing and b"\0" in source.head[:64]


def _text_kind(head: bytes, ending: str) -> str:
    if KIND_OF_SUFFIX.get(ending) == CSV:
        return CSV
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip(SPACE)
    if text.startswith(b"[") or (ending not in _ROW_A_LINE and _holds_rows(text)):
        return JSON_ARRAY
    return CSV if ending not in KIND_OF_SUFFIX and _is_header(text) else JSON_LINES


def _holds_rows(text: bytes) -> bool:
    """Say whether a file is one object around a list of rows, as ``{"data": [{…}, …]}``.

    A row of JSON lines may begin alike (``{"messages": [{``). Its list holds messages, it has other
    keys, and it ends with its line.

    Args:
        text: The first `HEAD` bytes, or all of a shorter file.
    """
    found = HOLDS_ROWS.match(text)
    if not found or found["inner"] in _OF_MESSAGES:
        return False
    try:
        (rows,) = json.loads(text).values()
    except ValueError:  # it goes on behind the head, or has other keys or lines
        line = text.partition(b"\n")[0]
        return _is_cut(line) and found["key"] in _HOLDERS
    return all(isinstance(row, dict) for row in rows)


def _is_cut(line: bytes) -> bool:
    """Say whether a line is the beginning of an object only."""
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _is_header(text: bytes) -> bool:
    """Say whether a first line names columns."""
    line = text.splitlines()[0].decode("utf-8", "replace") if text else ""
    try:
        cells = next(csv.reader([line], delimiter=delimiter_of(line), strict=True), [])
    except csv.Error:
        return False
    return len(cells) > 1 and all(_COLUMN_NAME.fullmatch(cell) for cell in cells)
