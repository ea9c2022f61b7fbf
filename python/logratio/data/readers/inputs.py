"""Turn inputs into rows: find the files of a folder, detect each file type from its first bytes."""

import codecs
import csv
import errno
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, TypeAlias, cast

from logratio.data.readers.arrow import (
    ARROW_MAGIC,
    PARQUET_MAGIC,
    STREAM_MAGIC,
    ArrowFileRows,
    ArrowStreamRows,
    ParquetRows,
)
from logratio.data.readers.csv import CsvRecords, delimiter_of
from logratio.data.readers.derived_rows import GroupedRows, MappedRows, RowFunction
from logratio.data.readers.json import HOLDERS, HOLDS_ROWS, JsonArray, JsonLines
from logratio.data.readers.row_list import ListRows, RowList, is_row_list, is_set
from logratio.data.readers.rows import MAX_RECORD_BYTES, SPACE, ByteSource, Rows, TextRows
from logratio.data.readers.tables import DatasetRows, StreamRows
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import InputError, IsFolderError, SettingTypeError
from logratio.validation import Converted, with_article

JSON_LINES, JSON_ARRAY, CSV = "JSON lines", "JSON array", "CSV"
PARQUET, ARROW_FILE, ARROW_STREAM = "Parquet", "Arrow file", "Arrow stream"

COMPRESSED_SUFFIXES = {".gz", ".zst", ".zstd"}
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
"""The container by the suffix of a file name, after a compression suffix has been removed."""

_ROW_A_LINE = {".jsonl", ".ndjson"}

_MAGIC = {PARQUET_MAGIC: PARQUET, ARROW_MAGIC: ARROW_FILE, STREAM_MAGIC: ARROW_STREAM}
_UNREAD = {
    b"PK\x03\x04": "a ZIP archive",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\x1f\x8b": "compressed with gzip twice",
    b"\x28\xb5\x2f\xfd": "compressed with zstd twice",
    b"PARE": "an encrypted Parquet file",
    b"FEA1": "a Feather file of version 1",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer instead of the file itself (run git lfs pull)",
}
STORE_MAGIC = b"LRSTORE"
_STORE_USES = (
    "which holds token ids, not rows: `logratio data report` and `data verify` describe it; train, "
    "precompute and evaluate take it as their only input"
)
_OF_MESSAGES = {b"role", b"content", b"from", b"value", b"name", b"type"}
"""First keys of messages and of other objects inside a row."""
_TABLES = {PARQUET, ARROW_FILE, ARROW_STREAM}
_COLUMN_NAME = re.compile(r"[\w .-]{0,64}")


def suffix(name: str) -> str:
    """Return the suffix that names a file's type: ".csv" for "a.csv.gz"."""
    path = PurePath(name)
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def is_table(source: ByteSource) -> bool:
    """Return whether a source is Parquet or Arrow rather than text."""
    return any(source.head.startswith(magic) for magic in _MAGIC)


def detect_kind(source: ByteSource) -> str:
    """Detect the container of a source, one of the values of `KIND_OF_SUFFIX`.

    Raises:
        InvalidRecordError: E108 if the first bytes contradict the file's name, E112 if the file
            type is not supported.
    """
    head, named = source.head, KIND_OF_SUFFIX.get(suffix(source.name))
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            if kind == PARQUET and source.compression:
                raise InvalidRecordError(
                    "E112", f"Parquet inside {source.compression}: decompress it"
                )
            return kind
    if unread := _unread(head):
        raise InvalidRecordError("E112", f"the file is {unread}")
    if named in _TABLES and head:
        raise InvalidRecordError("E108", f"the name says {named}, but the content is not")
    if _is_packed_and_damaged(source):
        raise InvalidRecordError("E108", "the name says compressed, but the content is not")
    return _text_kind(head, suffix(source.name))


def _unread(head: bytes) -> str | None:
    """Describe an unsupported file and what to do with it; None if its type may be supported."""
    for magic, what in _UNREAD.items():
        if head.startswith(magic):
            return f"{what}, which is not supported"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "text in UTF-16: give --encoding utf-16"
    if head[257:262] == b"ustar":
        return "a tar archive, which is not supported: extract it"
    return f"a sealed store, {_STORE_USES}" if head.startswith(STORE_MAGIC) else None


def _is_packed_and_damaged(source: ByteSource) -> bool:
    is_named = PurePath(source.name).suffix.lower() in COMPRESSED_SUFFIXES
    return is_named and not source.compression and b"\0" in source.head[:64]


def _text_kind(head: bytes, ending: str) -> str:
    if KIND_OF_SUFFIX.get(ending) == CSV:
        return CSV
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip(SPACE)
    if text.startswith(b"[") or (ending not in _ROW_A_LINE and _holds_rows(text)):
        return JSON_ARRAY
    return CSV if ending not in KIND_OF_SUFFIX and _is_header(text) else JSON_LINES


def _holds_rows(text: bytes) -> bool:
    """Return whether a file is one object around a list of rows, as ``{"data": [{…}, …]}``.

    A row of JSON lines may begin in the same way (``{"messages": [{``). But its list holds
    messages, it has other keys, and it ends at the end of its line.

    Args:
        text: The first `HEAD` bytes, or the whole file if it is shorter.
    """
    found = HOLDS_ROWS.match(text)
    if not found or found["inner"] in _OF_MESSAGES:
        return False
    try:
        (rows,) = json.loads(text).values()
    except ValueError:  # the object is longer than the head, or has other keys or lines
        line = text.partition(b"\n")[0]
        return _is_cut(line) and found["key"].decode("utf-8", "replace") in HOLDERS
    return all(isinstance(row, dict) for row in rows)


def _is_cut(line: bytes) -> bool:
    """Return whether a line is only the beginning of an object."""
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _is_header(text: bytes) -> bool:
    """Return whether a first line names columns."""
    line = text.splitlines()[0].decode("utf-8", "replace") if text else ""
    try:
        cells = next(csv.reader([line], delimiter=delimiter_of(line), strict=True), [])
    except csv.Error:
        return False
    return len(cells) > 1 and all(_COLUMN_NAME.fullmatch(cell) for cell in cells)


_METADATA_FILES = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
_DOCUMENT_STEMS = {"readme", "license", "licence", "notice", "citation", "changelog"}
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words that name a split, as `datasets` uses them."""
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_PARTS_OF_ONE = {"data", "part", "shard", "chunk"}
_NAMED = 4  # most files of one split that an error lists
_CONFIG = re.compile(r"^\s*-?\s*config_name:\s*[\"']?([\w.-]+)", re.MULTILINE)


def data_files(folder: Path, split: str | None = None) -> tuple[list[Path], list[Path]]:
    """List the data files below a folder, sorted by path.

    Args:
        folder: A folder of files, a clone of a dataset, or its folder in the hub's cache.
        split: The split to read. None: the only one.

    Returns:
        The files to read, and the files that are ignored: hidden ones, those whose names begin
        with an underscore, README, LICENSE, Markdown, `dataset_info.json` …

    Raises:
        OSError: The folder has no data file, a file of unknown type, several splits or
            configurations of which none is chosen, or no split of that name.
    """
    folder = _snapshot(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    ignored = [path for path in files if _is_ignored(path.relative_to(folder))]
    files = [path for path in files if path not in set(ignored)]
    unknown = [path for path in files if suffix(path.name) not in KIND_OF_SUFFIX]
    if unknown:
        names = ", ".join(path.relative_to(folder).as_posix() for path in unknown[:5])
        more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
        reason = f"Holds files of unknown type ({names}{more}); name the files to read"
        raise InputError(errno.EINVAL, reason, str(folder))
    if not files:
        raise InputError(errno.ENOENT, "Holds no data file", str(folder))
    _check_configs(folder, files)
    return _chosen(folder, files, split), ignored


def chosen_split(names: Iterable[str], split: str | None) -> str | None:
    """Choose one of several splits.

    Args:
        names: The existing splits.
        split: The name of one, or a synonym (``dev`` for ``validation``). None: the only one.

    Returns:
        One of the names, or None if none matches or the choice is ambiguous.
    """
    names = list(names)
    if split is None:
        return names[0] if len(names) == 1 else None
    if split in names:
        return split
    wanted = _WORDS.get(split, split)
    return next((name for name in names if _WORDS.get(name, name) == wanted), None)


def _chosen(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Return the files of one split.

    If at most one split exists, files whose names contain no split are read with it.
    """
    saved = _saved_splits(folder)
    of = {path: _split_of(path.relative_to(folder), saved) for path in files}
    names = sorted({name for name in of.values() if name is not None})
    if split is None and len(names) < 2:
        return files
    name = chosen_split(names, split)
    if name is None:
        raise InputError(errno.EINVAL, _choice(folder, of, names, split), str(folder))
    return [path for path in files if of[path] == name]


def _choice(
    folder: Path, of: Mapping[Path, str | None], names: list[str], split: str | None
) -> str:
    if not names:
        return f"Holds no split {split!r}: the names of its files contain no split"
    listed = []
    for name in names:
        paths = [path.relative_to(folder).as_posix() for path in of if of[path] == name]
        more = f" and {len(paths) - _NAMED:,} more" if len(paths) > _NAMED else ""
        listed.append(f"{name}: {', '.join(paths[:_NAMED])}{more}")
    what = "Holds several splits" if split is None else f"Holds no split {split!r}"
    shown = next((name for name in names if name.startswith("train")), names[-1])
    return f"{what}; choose one with --split {shown}, or name its files ({'; '.join(listed)})"


def _split_of(path: Path, saved: frozenset[str]) -> str | None:
    """Derive a file's split from its path below the folder; None if the path contains no split."""
    if saved:
        return path.parts[0] if path.parts[0] in saved else None
    shard = _SHARD.match(path.name)
    if shard and shard["split"] not in _PARTS_OF_ONE:
        return shard["split"]
    stem = path.name.partition(".")[0]
    for part in (stem, *reversed(path.parts[:-1])):
        found = {_WORDS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _WORDS}
        if len(found) == 1:
            return found.pop()
    return None


def _saved_splits(folder: Path) -> frozenset[str]:
    """Read the splits of a folder that `DatasetDict.save_to_disk` wrote."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        return frozenset(map(str, splits))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def _snapshot(folder: Path) -> Path:
    """Return the snapshot of a dataset's folder in the hub's cache; any other folder unchanged."""
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("datasets--") and snapshots.is_dir()):
        return folder
    names = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and (name := main.read_text().strip()) in names:
        return snapshots / name
    if len(names) == 1:
        return snapshots / names[0]
    reason = f"Holds several snapshots ({', '.join(names)}): name the folder of one"
    raise InputError(errno.EINVAL, reason, str(folder))


def _check_configs(folder: Path, files: list[Path]) -> None:
    """Refuse several configurations in one folder, if the dataset card names them."""
    card = folder / "README.md"
    if not card.is_file():
        return
    front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    configs = set(_CONFIG.findall(front[1])) if front else set()
    tops = sorted({path.relative_to(folder).parts[0] for path in files} & configs)
    if len(tops) > 1:
        reason = f"Holds several configurations ({', '.join(tops)}): name the folder of one"
        raise InputError(errno.EINVAL, reason, str(folder))


def _is_ignored(path: Path) -> bool:
    if any(part.startswith((".", "_")) for part in path.parts):
        return True
    is_text = path.stem.lower() in _DOCUMENT_STEMS or path.suffix.lower() == ".md"
    return path.name in _METADATA_FILES or is_text


Input: TypeAlias = Any
"""A path (`str` or `Path`) of a file or folder, "-" for stdin, a list of dicts, a
`datasets.Dataset`, or anything with ``__arrow_c_stream__``: tables and readers of pyarrow, pandas,
polars, duckdb."""

STDIN = "-"


def names_stdin(given: Input) -> bool:
    """Return whether an input is standard input. Tables would compare cell by cell."""
    return isinstance(given, str | Path) and str(given) == STDIN


def as_inputs(given: "Input | Sequence[Input]") -> list[Input]:
    """Return one input, or several, as a list. A list of dicts is one input: see `RowList`.

    Raises:
        SettingTypeError: The value is neither a path, nor a table, nor a sequence of these.
    """
    if isinstance(given, str | Path) or _is_table(given):
        return [given]
    if is_row_list(given):
        return [RowList(cast(Sequence[Any], given))]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        hint = _hint(given) if isinstance(given, Mapping) else ""
        raise SettingTypeError(f"{with_article(type(given).__name__)} is not data: {hint}{_WANTED}")
    items = list(given)
    _check_items(items)
    return [RowList(one) if is_row_list(one) else one for one in items]


def _hint(given: Mapping[Any, Any]) -> str:
    """Return what to give instead of a dict: one row, or data sets by name as in transformers."""
    if given and all(map(_is_table, given.values())):
        return "give a list of its data sets, whose accuracies are then reported one by one; or "
    return "a dict is one row: put it into a list; or "


def _check_items(items: Sequence[Any]) -> None:
    """Refuse a list with dicts in which an item is no dict, and an item that is no data."""
    has_rows = any(isinstance(item, Mapping) and not is_set(item) for item in items)
    for number, item in enumerate(items, 1):
        kind = with_article(type(item).__name__)
        if has_rows and not (isinstance(item, Mapping) and not is_set(item)):
            raise SettingTypeError(
                f"row {number} of the list is {kind}, not a dict: each row is a dict such "
                'as {"prompt": …, "chosen": …, "rejected": …}'
            )
        if not (isinstance(item, str | Path) or _is_table(item) or is_row_list(item) or has_rows):
            raise SettingTypeError(f"item {number} of the list is {kind}: {_WANTED}")


def _is_table(given: Any) -> bool:
    return isinstance(given, RowList) or is_set(given) or hasattr(given, "__arrow_c_stream__")


_WANTED = (
    "give paths, '-' for stdin, a list of dicts, a datasets.Dataset, or a table with "
    "__arrow_c_stream__ (pyarrow, pandas, polars' collected frames, duckdb)"
)
Inputs: TypeAlias = Annotated[Input | Sequence[Input], Converted(as_inputs)]
"""One input, or several."""

_READERS: dict[str, Callable[[ByteSource, str, int], Rows]] = {
    JSON_LINES: JsonLines,
    JSON_ARRAY: JsonArray,
    CSV: CsvRecords,
    PARQUET: ParquetRows,
    ARROW_FILE: ArrowFileRows,
    ARROW_STREAM: ArrowStreamRows,
}


class Opened(list[Rows]):
    """The containers of several inputs, in order.

    Attributes:
        inputs: For each container, the index of its input.
        left_out: Files of folders that were ignored, because they are not data.
    """

    def __init__(self, rows: Sequence[Rows] = (), left_out: Sequence[Path] = ()) -> None:
        super().__init__(rows)
        self.inputs: list[int] = []
        self.left_out = tuple(left_out)


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read the containers.

    Attributes:
        split: Split of folders and of a `DatasetDict` to read, as ``train``. Files that are named
            one by one are always read. None: the only split.
        encoding: Encoding of text files (JSON, CSV), by its Python name. None: UTF-8.
        function: Function to apply to each row first.
        group_by: Key by which adjacent rows with equal values are merged, after the function.
    """

    split: str | None = None
    encoding: str | None = None
    function: RowFunction | None = None
    group_by: str | None = None


def open_inputs(
    inputs: Inputs, reading: Reading | None = None, *, max_line_bytes: int = MAX_RECORD_BYTES
) -> Opened:
    """Open every input and detect its type. A folder is replaced by its data files, sorted by path.

    Args:
        inputs: One input or several: paths, "-" for stdin, tables.
        reading: How to read them. None: the defaults.
        max_line_bytes: Most bytes of one line, element, record or row.

    Returns:
        One container for each file and table, in order.

    Raises:
        OSError: A file or folder cannot be read, or a folder holds unknown files.
        SettingTypeError: An input is neither a path nor a table, or has several splits.
        MissingArrowError: pyarrow is needed but not installed.
    """
    inputs = as_inputs(inputs)
    if sum(map(names_stdin, inputs)) > 1:
        raise InputError(errno.EINVAL, "Can be read only once", "stdin")
    reading = reading or Reading()
    opened, tables = Opened(), 0
    left_out: list[Path] = []
    for number, given in enumerate(inputs):
        if not isinstance(given, str | Path):
            table = _one_split(given, reading.split)
            rows = _open_table(table, f"<table {tables}>", max_line_bytes)
            opened.append(_derive(rows, reading))
            opened.inputs.append(number)
            tables += 1
            continue
        for path in _files(Path(given), reading.split, left_out):
            rows = open_file(path, encoding=reading.encoding, max_line_bytes=max_line_bytes)
            opened.append(_derive(rows, reading))
            opened.inputs.append(number)
    opened.left_out = tuple(left_out)
    names = [rows.name for rows in opened]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(
            errno.EINVAL, "Named twice; name it once (--mix draws it more often)", twice
        )
    return opened


def _derive(rows: Rows, reading: Reading) -> Rows:
    if reading.function:
        rows = MappedRows(rows, reading.function)
    return GroupedRows(rows, reading.group_by) if reading.group_by else rows


def open_file(
    path: Path, *, encoding: str | None = None, max_line_bytes: int = MAX_RECORD_BYTES
) -> Rows:
    """Open one file, or stdin for the path "-", and detect its type.

    A file that cannot be read as rows yields one refusal.

    Raises:
        OSError: The file cannot be read, or is a folder.
        MissingArrowError: pyarrow is needed but not installed.
    """
    if str(path) == STDIN:
        source = ByteSource.of_stdin()
    elif path.is_dir():
        raise IsFolderError(errno.EISDIR, "Is a folder; name the files in it", str(path))
    else:
        source = ByteSource.of_file(path)
    try:
        if encoding and not is_table(source):
            source.read_as(encoding)
        kind = detect_kind(source)
    except InvalidRecordError as error:
        return _Unread(source, error)
    return _READERS[kind](source, kind, max_line_bytes)


def _files(path: Path, split: str | None, left_out: list[Path]) -> list[Path]:
    if str(path) == STDIN or not path.is_dir():
        return [path]
    files, ignored = data_files(path, split)
    left_out += ignored
    return files


def _one_split(table: Any, split: str | None) -> Any:
    """Return one split of a `datasets.DatasetDict`; any other value unchanged."""
    if not (is_set(table) and isinstance(table, dict)):
        return table
    name = chosen_split(table, split)
    if name is None:
        names = ", ".join(map(repr, table))
        missing = "" if split is None else f", but not {split!r}"
        raise SettingTypeError(
            f"a {type(table).__name__} with the splits {names}{missing}: pass one of them, or name "
            "it with split"
        )
    return table[name]


def _open_table(table: Any, name: str, limit: int) -> Rows:
    if isinstance(table, RowList):
        return ListRows(table, name)
    if is_set(table):
        return DatasetRows(table, name, limit)
    if hasattr(table, "__arrow_c_stream__"):
        return StreamRows(table, name, limit)
    raise SettingTypeError(f"a {type(table).__name__} is not data: {_WANTED}")


class _Unread(TextRows):
    """A file that cannot be read; it yields one refusal."""

    def __init__(self, source: ByteSource, error: InvalidRecordError) -> None:
        super().__init__(source, "not read", 0)
        self._error = error

    def _records(self) -> Iterator[tuple[Source, Refusal]]:
        yield self._last(self._error, line=0)
