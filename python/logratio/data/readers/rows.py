"""What every container of rows can do."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from logratio.data.readers.byte_streams import ByteSource
from logratio.data.records import InvalidRecordError, Refusal, Source

MAX_RECORD_BYTES = 64 << 20
"""A longer line or record is refused (E107): that is no record, it is a file without line ends."""

SPACE = b" \t\r\n"
NO_ROW = "the file is empty, or holds no record"

OTHER_ENCODING = "save the file as UTF-8, or name its encoding, as --encoding cp1252"

Row = dict[str, Any]


class Rows(Protocol):
    """The rows of one container, in order: a file, stdin, or a table in memory.

    Iterating starts at the first row, or where `go_on` said. Files and tables can be iterated
    again; stdin and streams of batches cannot.

    Attributes:
        kind: What it was recognised as, for people: "JSON lines, gzip".
    """

    kind: str

    @property
    def blank_lines(self) -> int:
        """Blank lines met so far."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def size(self) -> int | None:
        """Bytes as they lie on the disk, or rows of a table; None: not known."""

    @property
    def position(self) -> int:
        """How much of `size` was read."""

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each row's source, and the row or what is wrong with it.

        Raises:
            OSError: The file cannot be read (again).
        """

    def columns(self) -> tuple[str, ...] | None:
        """Return the columns' names; None where each row has its own keys."""

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of the first row, from 1, and a `pyarrow.RecordBatch`, ≤ 8,192 rows.

        In the place of a row that is too long stands its refusal; the last thing may be what is
        wrong with the container: damaged, or empty.

        Raises:
            TypeError: `columns` is None.
        """

    def mark(self) -> dict[str, Any]:
        """Return, as JSON values, the place behind the row or batch that was yielded last."""

    def go_on(self, mark: dict[str, Any]) -> None:
        """Let the next iteration go on at a mark of the same data, under whatever name."""


class TextRows(ABC):
    """Base of the containers that are read as text, each row with its own keys.

    A subclass yields from `_records`, and keeps the state in `_offset` (unpacked bytes before the
    next record), `_line` (lines before it) and `_is_empty` true to what was yielded.
    """

    blank_lines: int
    _offset: int
    _line: int
    _is_empty: bool
    _is_done: bool

    def __init__(self, source: ByteSource, kind: str, max_record_bytes: int) -> None:
        self.kind = f"{kind}, {source.packing}" if source.packing else kind
        self._source = source
        self._limit = max_record_bytes
        self._first: dict[str, Any] = {}
        self._restart()

    @property
    def name(self) -> str:
        """The file's name as given."""
        return self._source.name

    @property
    def size(self) -> int | None:
        """Bytes on disk."""
        return self._source.size

    @property
    def position(self) -> int:
        """Bytes read so far (compressed bytes where it is compressed)."""
        return self._source.position

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each row's source, and the row or what is wrong with it."""
        self._restart()
        if self._is_done:
            return
        try:
            yield from self._records()
            self._is_done = True
            if self._is_empty:
                yield self._refused("E106", NO_ROW, line=0)
        finally:
            self._source.close(is_done=self._is_done)

    def columns(self) -> None:
        """Return None: each row has its own keys."""
        return None

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Refuse: there are no columns."""
        raise TypeError(f"{self.kind} has rows and no columns")

    def mark(self) -> dict[str, Any]:
        """Return the place behind the row that was yielded last."""
        return {
            "offset": self._offset,
            "line": self._line,
            "blank_lines": self.blank_lines,
            "is_empty": self._is_empty,
            "is_done": self._is_done,
        }

    def go_on(self, mark: dict[str, Any]) -> None:
        """Let the next iteration go on at a mark."""
        self._first = dict(mark)
        self._restart()

    def _restart(self) -> None:
        self._offset = int(self._first.get("offset", 0))
        self._line = int(self._first.get("line", 0))
        self.blank_lines = int(self._first.get("blank_lines", 0))
        self._is_empty = bool(self._first.get("is_empty", True))
        self._is_done = bool(self._first.get("is_done", False))

    @abstractmethod
    def _records(self) -> Iterator[tuple[Source, Row | Refusal]]: ...

    def _refused(self, code: str, reason: str, *, line: int) -> tuple[Source, Refusal]:
        source = Source(self.name, line)
        return source, Refusal(source, code, reason)

    def _last(self, error: InvalidRecordError, *, line: int) -> tuple[Source, Refusal]:
        """Return the refusal behind which nothing can be read."""
        self._is_empty, self._is_done = False, True
        return self._refused(error.code, error.reason, line=line)
