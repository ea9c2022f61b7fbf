"""What a user names as data to containers of rows."""

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from logratio.data.containers import recognition
from logratio.data.containers.arrow_rows import ArrowFileRows, ArrowStreamRows
from logratio.data.containers.csv_records import CsvRecords
from logratio.data.containers.folders import chosen_split, data_files
from logratio.data.containers.grouped_rows import GroupedRows
from logratio.data.containers.json_array import JsonArray
from logratio.data.containers.json_lines import JsonLines
from logratio.data.containers.mapped_rows import MappedRows, RowFunction
from logratio.data.containers.memory_tables import DatasetRows, StreamRows
from logratio.data.containers.parquet_rows import ParquetRows
from logratio.data.containers.rows import MAX_RECORD_BYTES, Rows, TextRows
from logratio.data.containers.sources import ByteSource
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import InputError, IsFolderError, SettingTypeError
from logratio.validation import Converted

Input: TypeAlias = Any
"""A path (`str` or `Path`) of a file or folder, "-" for stdin, a `datasets.Dataset`, or anything
with ``__arrow_c_stream__``: tables and readers of pyarrow, polars, duckdb."""

STDIN = "-"


def as_inputs(given: "Input | Sequence[Input]") -> list[Input]:
    """Return what a user names as data as a list: one input alone is a list of one.

    Raises:
        SettingTypeError: it is neither a path, nor a table, nor several of these.
    """
    if isinstance(given, str | Path) or _is_table(given):
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise SettingTypeError(f"a {type(given).__name__} is no data: {_WANTED}")
    return list(given)


def _is_table(given: Any) -> bool:
    return _is_set(given) or hasattr(given, "__arrow_c_stream__")


_WANTED = (
    "give paths, '-' for stdin, a datasets.Dataset, or a table with __arrow_c_stream__ (pyarrow, "
    "polars' collected frames, duckdb)"
)
Inputs: TypeAlias = Annotated[Input | Sequence[Input], Converted(as_inputs)]
"""One input, or several."""

_READERS: dict[str, Callable[[ByteSource, str, int], Rows]] = {
    recognition.JSON_LINES: JsonLines,
    recognition.JSON_ARRAY: JsonArray,
    recognition.CSV: CsvRecords,
    recognition.PARQUET: ParquetRows,
    recognition.ARROW_FILE: ArrowFileRows,
    recognition.ARROW_STREAM: ArrowStreamRows,
}


class Opened(list[Rows]):
    """The containers of several inputs, in order.

    Attributes:
        inputs: For each container, the number of the input that it belongs to.
        left_out: Files of folders that were not taken, because they stand beside data.
    """

    def __init__(self, rows: Sequence[Rows] = (), left_out: Sequence[Path] = ()) -> None:
        super().__init__(rows)
        self.inputs: list[int] = []
        self.left_out = tuple(left_out)


@dataclass(frozen=True, slots=True)
class Reading:
    """What is said about the containers.

    Attributes:
        split: Which split of folders and of a `DatasetDict` is read, as ``train``; a file that is
            named is read whatever its name. None: the only one.
        encoding: Of files of text (JSON, CSV), as Python names it; None: UTF-8.
        function: What each row goes through first.
        group_by: A key: neighbours with one value there become one row, after the function.
    """

    split: str | None = None
    encoding: str | None = None
    function: RowFunction | None = None
    group_by: str | None = None


def open_inputs(
    inputs: Inputs, reading: Reading | None = None, *, max_line_bytes: int = MAX_RECORD_BYTES
) -> Opened:
    """Recognise every input; a folder is the data files in it, in the order of their paths.

    Args:
        inputs: Paths, "-" for stdin, tables; one alone, or several.
        reading: What is said about them.
        max_line_bytes: Most bytes of a line, an element, a record, a row.

    Raises:
        OSError: A file or folder cannot be read, or a folder holds what is not known.
        SettingTypeError: An input is neither a path nor a table, or has several splits.
        MissingArrowError: pyarrow is needed and not installed.
    """
    inputs = as_inputs(inputs)
    if sum(isinstance(given, str | Path) and str(given) == STDIN for given in inputs) > 1:
        raise InputError(errno.EINVAL, "Can be read only once", "stdin")
    reading = reading or Reading()
    opened, tables = Opened(), 0
    left_out: list[Path] = []
    for number, given in enumerate(inputs):
        if not isinstance(given, str | Path):
            table = _one_split(given, reading.split)
            rows = _open_table(table, f"<table {tables}>", max_line_bytes)
            opened.append(_remade(rows, reading))
            opened.inputs.append(number)
            tables += 1
            continue
        for path in _files(Path(given), reading.split, left_out):
            rows = open_file(path, encoding=reading.encoding, max_line_bytes=max_line_bytes)
            opened.append(_remade(rows, reading))
            opened.inputs.append(number)
    opened.left_out = tuple(left_out)
    names = [rows.name for rows in opened]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(
            errno.EINVAL, "Named twice; name it once (--mix draws it more often)", twice
        )
    return opened


def _remade(rows: Rows, reading: Reading) -> Rows:
    if reading.function:
        rows = MappedRows(rows, reading.function)
    return GroupedRows(rows, reading.group_by) if reading.group_by else rows


def open_file(
    path: Path, *, encoding: str | None = None, max_line_bytes: int = MAX_RECORD_BYTES
) -> Rows:
    """Recognise one file, or stdin where the path is "-".

    Raises:
        OSError: It cannot be read, or is a folder.
        MissingArrowError: pyarrow is needed and not installed.
    """
    if str(path) == STDIN:
        source = ByteSource.of_stdin()
    elif path.is_dir():
        raise IsFolderError(errno.EISDIR, "Is a folder; name the files in it", str(path))
    else:
        source = ByteSource.of_file(path)
    try:
        if encoding and not recognition.is_table(source):
            source.read_as(encoding)
        kind = recognition.recognised(source)
    except InvalidRecordError as error:
        return _Unread(source, error)
    return _READERS[kind](source, kind, max_line_bytes)


def _files(path: Path, split: str | None, left_out: list[Path]) -> list[Path]:
    if str(path) == STDIN or not path.is_dir():
        return [path]
    files, beside = data_files(path, split)
    left_out += beside
    return files


def _one_split(table: Any, split: str | None) -> Any:
    """Take one split of a `datasets.DatasetDict`; anything else is itself."""
    if not (_is_set(table) and isinstance(table, dict)):
        return table
    name = chosen_split(table, split)
    if name is None:
        names = ", ".join(map(repr, table))
        missing = "" if split is None else f", and {split!r} is none of them"
        raise SettingTypeError(
            f"a {type(table).__name__} of the splits {names}{missing}: give one of them, or name "
            "it with split"
        )
    return table[name]


def _is_set(table: Any) -> bool:
    return type(table).__module__.partition(".")[0] == "datasets"


def _open_table(table: Any, name: str, limit: int) -> Rows:
    if _is_set(table):
        return DatasetRows(table, name, limit)
    if hasattr(table, "__arrow_c_stream__"):
        return StreamRows(table, name, limit)
    raise SettingTypeError(f"a {type(table).__name__} is no data: {_WANTED}")


class _Unread(TextRows):
    """A file that cannot be read at all."""

    def __init__(self, source: ByteSource, error: InvalidRecordError) -> None:
        super().__init__(source, "not read", 0)
        self._error = error

    def _records(self) -> Iterator[tuple[Source, Refusal]]:
        yield self._last(self._error, line=0)
