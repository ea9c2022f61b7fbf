"""Columns instead of rows: what Parquet, Arrow files and streams, and tables in memory share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from logratio.data.containers.arrow_library import is_damage
from logratio.data.containers.rows import NO_ROW, Row
from logratio.data.records import InvalidRecordError, Refusal, Source

BATCH_ROWS = 8192
"""Most rows of a batch that is handed out."""

SLICE_ROWS = 512
"""Most rows that are Python objects at a time."""

OpenTable = tuple[tuple[str, ...], Iterator[tuple[int, Any]]]
"""The columns' names, and the record batches, each with the number of the part it belongs to."""


class TableRows(ABC):
    """Base of the containers that hold columns.

    A container has parts from 0, which can be gone to or at least be counted: row groups, batches.
    A subclass opens itself at a part with `_opened`.
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
        """Bytes on disk, or rows of a table; None: not known."""

    @property
    @abstractmethod
    def position(self) -> int:
        """How much of `size` was read."""

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each row's source, and the row or what is wrong with it."""
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
        """Return the columns' names; none of what is too damaged to be opened."""
        try:
            with self._told(), self._opened(0) as (names, _):
                return names
        except InvalidRecordError:
            return ()

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of the first row, from 1, and a `pyarrow.RecordBatch` or a refusal."""
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
        """Return the place behind the row or batch that was yielded last."""
        return {
            "row": self._row,
            "part": self._part,
            "part_row": self._part_row,
            "is_done": self._is_done,
        }

    def go_on(self, mark: dict[str, Any]) -> None:
        """Let the next iteration go on at a mark."""
        self._first = dict(mark)
        self._restart()

    def _restart(self) -> None:
        self._row = int(self._first.get("row", 0))  # the rows before the next one
        self._part = int(self._first.get("part", 0))
        self._part_row = int(self._first.get("part_row", 0))
        self._is_done = bool(self._first.get("is_done", False))

    @abstractmethod
    def _opened(self, part: int) -> AbstractContextManager[OpenTable]: ...

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what pyarrow says of damaged data into one sentence."""
        try:
            yield
        except InvalidRecordError:
            raise
        except Exception as error:
            if not is_damage(error):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidRecordError("E108", f"{self.kind} that is damaged: {said}") from None

    def _slices(self, most: int) -> Iterator[Any]:
        """Yield batches of so many rows or fewer, and of one row where rows are long."""
        self._restart()
        if self._is_done:
            return
        skip = self._part_row
        with self._told(), self._opened(self._part) as (names, batches):
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
        """Return the refusal behind which nothing can be read; of the file if no row came."""
        self._is_done = True
        if self._row:
            self._advance(1)
        return self._refused(error.code, error.reason)


def _check_names(names: tuple[str, ...]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRecordError("E113", f"two columns are named {twice!r}")


def _split(batch: Any, most: int, limit: int) -> Iterator[Any]:
    """Cut a batch, without a copy, into pieces of few rows and few bytes."""
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
    """Leave the null fields of objects out."""
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def rows_of(batch: Any) -> Iterator[Row | UnicodeDecodeError]:
    """Make Python objects of a batch's rows; an error in the place of one that is no text.

    A column of structs has every field in every row: those that a row does not have are null in the
    table, and are left out here, at any depth. So a row is the same from JSON and from a table.
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
