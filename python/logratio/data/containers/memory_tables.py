"""Tables in memory: what hands over an Arrow stream, and the sets of `datasets`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from logratio.data.containers.arrow_library import arrow
from logratio.data.containers.table_rows import OpenTable, TableRows
from logratio.errors import SettingTypeError

_SET_ROWS = 1000  # as `datasets` writes and reads them


class StreamRows(TableRows):
    """The rows of anything with ``__arrow_c_stream__``; its parts are the batches it hands over.

    What can be streamed once only, like a `RecordBatchReader`, can be iterated once only.
    """

    def __init__(self, table: Any, name: str, max_record_bytes: int) -> None:
        super().__init__(name, f"{type(table).__name__} in memory", max_record_bytes)
        self._table = table
        self._library = arrow(self.kind)
        self._reader: Any = None

    @property
    def size(self) -> int | None:
        """Rows, where the table knows."""
        for name in ("num_rows", "height"):
            if isinstance(rows := getattr(self._table, name, None), int):
                return rows
        return None

    @property
    def position(self) -> int:
        """Rows so far."""
        return self._row

    def columns(self) -> tuple[str, ...]:
        """Return the columns' names."""
        if self._reader is None:
            try:
                self._reader = self._library.RecordBatchReader.from_stream(self._table)
            except self._library.ArrowInvalid:  # a Series, a ChunkedArray
                raise SettingTypeError(f"{self.kind} has no columns: give a table") from None
        return tuple(self._reader.schema.names)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Let errors pass: what is in memory was not damaged on a disk."""
        yield

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        names = self.columns()
        reader, self._reader = self._reader, None
        yield names, ((i, batch) for i, batch in enumerate(reader) if i >= part)


class DatasetRows(TableRows):
    """The rows of a `datasets.Dataset` or `IterableDataset`, in its own order."""

    def __init__(self, dataset: Any, name: str, max_record_bytes: int) -> None:
        super().__init__(name, f"datasets.{type(dataset).__name__}", max_record_bytes)
        self._dataset = dataset.with_format("arrow")
        self._is_sized = hasattr(dataset, "num_rows")

    @property
    def size(self) -> int | None:
        """Rows; None of an iterable set."""
        return int(self._dataset.num_rows) if self._is_sized else None

    @property
    def position(self) -> int:
        """Rows so far."""
        return self._row

    def columns(self) -> tuple[str, ...]:
        """Return the columns' names; where an iterable set names none, its first row's."""
        if self._dataset.column_names is not None:
            return tuple(self._dataset.column_names)
        first = next(iter(self._dataset.iter(1)), None)
        return () if first is None else tuple(first.column_names)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Let errors pass: they come from the code that makes the rows."""
        yield

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        yield self.columns(), self._batches(part)

    def _batches(self, part: int) -> Iterator[tuple[int, Any]]:
        rest = self._dataset.skip(part * _SET_ROWS) if part else self._dataset
        for number, table in enumerate(rest.iter(_SET_ROWS), part):
            for batch in table.to_batches():
                yield number, batch
