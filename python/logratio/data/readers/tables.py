"""Containers of columns: tables in files, tables in memory, and datasets of `datasets`."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, BinaryIO

from logratio.data.readers.arrow_library import arrow, is_damage
from logratio.data.readers.rows import NO_ROW, ByteSource, Row
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import SettingTypeError

BATCH_ROWS = 8192
"""Most rows of a yielded batch."""

SLICE_ROWS = 512
"""Most rows converted to Python objects at a time."""

OpenTable = tuple[tuple[str, ...], Iterator[tuple[int, Any]]]
"""The column names, and the record batches, each with the number of its part."""


class TableRows(ABC):
    """Base class of containers that hold columns.

    A container has parts, numbered from 0: row groups or record batches. Reading can resume at a
    part. A subclass implements `_opened`, which opens the container at a part.
    """

    def __init__(self, name: str, kind: str, max_record_bytes: int) -> None:
        self.name = name
        self.kind = kind
        self.blank_lines = 0
        self._limit = max_record_bytes
        self._first: dict[str, Any] = {}
        self._restart()

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Bytes on disk, or rows of a table in memory. None: unknown."""

    @property
    @abstractmethod
    def position(self) -> int:
        """Amount of `size` read so far."""

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each row's source, and the row or its refusal."""
        try:
            for batch in self._slices(SLICE_ROWS):
                if self._is_too_long(batch):
                    self._advance(1)
                    yield self._refused("E107", self._too_long())
                    continue
                for row in rows_of(batch):
                    self._advance(1)
                    if isinstance(row, UnicodeDecodeError):
                        yield self._refused("E103", f"a text is not UTF-8 ({row.reason})")
                    else:
                        yield Source(self.name, self._row), row
        except InvalidRecordError as error:
            yield self._last(error)

    def columns(self) -> tuple[str, ...]:
        """Return the column names; empty if the container is too damaged to be opened."""
        try:
            with self._translate_errors(), self._opened(0) as (names, _):
                return names
        except InvalidRecordError:
            return ()

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of the first row, from 1, with a `pyarrow.RecordBatch` or a refusal."""
        try:
            for batch in self._slices(BATCH_ROWS):
                first = self._row + 1
                self._advance(len(batch))
                if self._is_too_long(batch):
                    yield first, self._refused("E107", self._too_long())[1]
                else:
                    yield first, batch
        except InvalidRecordError as error:
            source, refusal = self._last(error)
            yield source.line, refusal

    def mark(self) -> dict[str, Any]:
        """Return the position after the row or batch that was yielded last."""
        return {
            "row": self._row,
            "part": self._part,
            "part_row": self._part_row,
            "is_done": self._is_done,
        }

    def resume_from(self, mark: dict[str, Any]) -> None:
        """Start the next iteration at a mark."""
        self._first = dict(mark)
        self._restart()

    def _restart(self) -> None:
        self._row = int(self._first.get("row", 0))  # rows before the next one
        self._part = int(self._first.get("part", 0))
        self._part_row = int(self._first.get("part_row", 0))
        self._is_done = bool(self._first.get("is_done", False))

    @abstractmethod
    def _opened(self, part: int) -> AbstractContextManager[OpenTable]: ...

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn pyarrow's errors about damaged data into E108 with their first line."""
        try:
            yield
        except InvalidRecordError:
            raise
        except Exception as error:
            if not is_damage(error):
                raise
            message = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidRecordError("E108", f"damaged {self.kind}: {message}") from None

    def _slices(self, most: int) -> Iterator[Any]:
        """Yield batches of at most `most` rows, and fewer where rows are long."""
        self._restart()
        if self._is_done:
            return
        skip = self._part_row
        with self._translate_errors(), self._opened(self._part) as (names, batches):
            _check_names(names)
            for part, batch in batches:
                if part != self._part:
                    self._part, self._part_row, skip = part, 0, 0
                skipped = min(skip, len(batch))
                skip -= skipped
                yield from _split(batch.slice(skipped), most, self._limit)
        self._is_done = True
        if not self._row:
            raise InvalidRecordError("E106", NO_ROW)

    def _advance(self, rows: int) -> None:
        self._row += rows
        self._part_row += rows

    def _is_too_long(self, batch: Any) -> bool:
        return len(batch) == 1 and _size(batch) > self._limit

    def _too_long(self) -> str:
        return f"the row is longer than {self._limit:,} bytes"

    def _refused(self, code: str, reason: str) -> tuple[Source, Refusal]:
        source = Source(self.name, self._row)
        return source, Refusal(source, code, reason)

    def _last(self, error: InvalidRecordError) -> tuple[Source, Refusal]:
        """Return the refusal that ends the iteration; it names the file if no row came before."""
        self._is_done = True
        if self._row:
            self._advance(1)
        return self._refused(error.code, error.reason)


def _check_names(names: tuple[str, ...]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRecordError("E113", f"two columns are named {twice!r}")


def _split(batch: Any, most: int, limit: int) -> Iterator[Any]:
    """Split a batch, without a copy, until each slice is within both limits or is one row."""
    if len(batch) > most:
        for start in range(0, len(batch), most):
            yield from _split(batch.slice(start, most), most, limit)
    elif len(batch) > 1 and _size(batch) > limit:
        half = len(batch) // 2
        yield from _split(batch.slice(0, half), most, limit)
        yield from _split(batch.slice(half), most, limit)
    elif len(batch):
        yield batch


def _size(batch: Any) -> int:
    return int(batch.nbytes)


def _has_structs(kind: Any) -> bool:
    # By name, as pyarrow is not imported here.
    is_struct = type(kind).__name__ == "StructType"
    fields = range(getattr(kind, "num_fields", 0))
    return is_struct or any(_has_structs(kind.field(number).type) for number in fields)


def _filled(value: Any) -> Any:
    """Drop the null fields of objects, at any depth."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def rows_of(batch: Any) -> Iterator[Row | UnicodeDecodeError]:
    """Convert a batch to Python rows; a row that is not UTF-8 is yielded as its error.

    A struct column has every field in every row, null where the row had none. Null fields are
    dropped at any depth, so that JSON and tables give equal rows.
    """
    structs = [field.name for field in batch.schema if _has_structs(field.type)]
    try:
        for row in batch.to_pylist():
            for name in structs:
                row[name] = _filled(row[name])
            yield row
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            yield error
            return
        for number in range(len(batch)):
            yield from rows_of(batch.slice(number, 1))


class FileTable(TableRows):
    """Base class of tables in files."""

    def __init__(self, source: ByteSource, kind: str, max_record_bytes: int) -> None:
        if source.compression:
            kind = f"{kind}, {source.compression}"
        super().__init__(source.name, kind, max_record_bytes)
        self._source = source
        self._library = arrow(kind)
        self._share = 0.0  # fraction of the file read so far

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for stdin."""
        return self._source.size

    @property
    def position(self) -> int:
        """Approximate number of bytes read so far."""
        if self.size is None or self._source.compression:
            return self._source.position
        return self.size if self._is_done else int(self.size * self._share)


def check_tail(file: BinaryIO, magic: bytes) -> None:
    """Raise E102 unless the file ends with its magic bytes."""
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - len(magic)))
    if file.read(len(magic)) != magic:
        raise InvalidRecordError("E102", "the file ends before its table of contents")
    file.seek(0)


_SET_ROWS = 1000  # as `datasets` writes and reads them


class StreamRows(TableRows):
    """The rows of any object with ``__arrow_c_stream__``; its parts are the record batches.

    An object that streams only once, such as a `RecordBatchReader`, can be iterated only once.
    """

    def __init__(self, table: Any, name: str, max_record_bytes: int) -> None:
        super().__init__(name, f"{type(table).__name__} in memory", max_record_bytes)
        self._table = table
        self._library = arrow(self.kind)
        self._reader: Any = None

    @property
    def size(self) -> int | None:
        """Number of rows, if the table knows it."""
        for name in ("num_rows", "height"):
            if isinstance(rows := getattr(self._table, name, None), int):
                return rows
        return None

    @property
    def position(self) -> int:
        """Rows read so far."""
        return self._row

    def columns(self) -> tuple[str, ...]:
        """Return the column names."""
        if self._reader is None:
            try:
                self._reader = self._library.RecordBatchReader.from_stream(self._table)
            except self._library.ArrowInvalid:  # a Series, a ChunkedArray
                raise SettingTypeError(f"{self.kind} has no columns: give a table") from None
        return tuple(self._reader.schema.names)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Let errors pass: a table in memory cannot be a damaged file."""
        yield

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        names = self.columns()
        reader, self._reader = self._reader, None
        yield names, ((i, batch) for i, batch in enumerate(reader) if i >= part)


class DatasetRows(TableRows):
    """The rows of a `datasets.Dataset` or `IterableDataset`, in its order."""

    def __init__(self, dataset: Any, name: str, max_record_bytes: int) -> None:
        super().__init__(name, f"datasets.{type(dataset).__name__}", max_record_bytes)
        self._dataset = dataset.with_format("arrow")
        self._is_sized = hasattr(dataset, "num_rows")

    @property
    def size(self) -> int | None:
        """Number of rows; None for an `IterableDataset`."""
        return int(self._dataset.num_rows) if self._is_sized else None

    @property
    def position(self) -> int:
        """Rows read so far."""
        return self._row

    def columns(self) -> tuple[str, ...]:
        """Return the column names, taken from the first row if the dataset does not name them."""
        if self._dataset.column_names is not None:
            return tuple(self._dataset.column_names)
        first = next(iter(self._dataset.iter(1)), None)
        return () if first is None else tuple(first.column_names)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Let errors pass: they come from the user's code that produces the rows."""
        yield

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        yield self.columns(), self._batches(part)

    def _batches(self, part: int) -> Iterator[tuple[int, Any]]:
        rest = self._dataset.skip(part * _SET_ROWS) if part else self._dataset
        for number, table in enumerate(rest.iter(_SET_ROWS), part):
            for batch in table.to_batches():
                yield number, batch
