"""Decompress (gzip, zstd) and decode bytes, and the interface of every reader of rows."""

import codecs
import errno
import gzip
import io
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from logratio.data.readers.arrow_library import arrow, is_damage
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import InputError, MissingInputError, fetching_advice

GZIP, ZSTD = "gzip", "zstd"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK = 1 << 16
_CUT = "the file ends inside its compressed data"


def detect_compression(first: bytes) -> str:
    """Return "gzip" or "zstd" from the first four bytes, or "" for uncompressed data."""
    if first.startswith(b"\x1f\x8b"):
        return GZIP
    is_skippable = len(first) == 4 and first[1:] == b"\x2a\x4d\x18" and first[0] >> 4 == 5
    return ZSTD if first == _ZSTD_MAGIC or is_skippable else ""


def decompressed(packed: io.RawIOBase, kind: str) -> io.RawIOBase:
    """Return a raw decompressed stream; its reads raise InvalidRecordError (E102, E108)."""
    if kind == GZIP:
        return _Gzip(packed)
    return _Zstd(packed) if kind == ZSTD else packed


def transcoded(stream: io.RawIOBase, encoding: str) -> io.RawIOBase:
    """Return a raw stream that re-encodes text from `encoding` as UTF-8.

    Bytes that are invalid in `encoding` become a byte that is invalid in UTF-8, so that only the
    record that contains them is refused.
    """
    return _Transcoded(stream, encoding)


class _Transcoded(io.RawIOBase):
    def __init__(self, stream: io.RawIOBase, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_NO_TEXT)
        self._ready = b""
        self._is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and not self._is_at_end:
            content = self._stream.read(_BLOCK)
            self._is_at_end = not content
            text = self._decoder.decode(content or b"", final=self._is_at_end)
            self._ready = text.encode("utf-8", "surrogateescape")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _no_text(error: UnicodeError) -> tuple[str, int]:
    """Replace undecodable bytes by a surrogate that `surrogateescape` writes as the byte 0x80."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80", error.end


_NO_TEXT = "logratio-no-text"
codecs.register_error(_NO_TEXT, _no_text)


class _Gzip(io.RawIOBase):
    def __init__(self, packed: io.RawIOBase) -> None:
        self._packed = packed
        self._file = gzip.GzipFile(fileobj=cast(BinaryIO, io.BufferedReader(packed, 1 << 17)))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._file.readinto(buffer)
        except EOFError:
            raise InvalidRecordError("E102", _CUT) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InvalidRecordError("E108", f"the gzip data is damaged: {error}") from None

    def close(self) -> None:
        self._packed.close()
        super().close()


class _Zstd(io.RawIOBase):
    def __init__(self, packed: io.RawIOBase) -> None:
        library = arrow("zstd")
        self._packed = packed
        self._file = library.CompressedInputStream(library.PythonFile(packed, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return int(self._file.readinto(buffer))
        except OSError as error:
            if not is_damage(error):
                raise
            if "Truncated" in str(error):
                raise InvalidRecordError("E102", _CUT) from None
            reason = str(error).removeprefix("ZSTD decompress failed: ")
            raise InvalidRecordError("E108", f"the zstd data is damaged: {reason}") from None

    def close(self) -> None:
        self._packed.close()
        super().close()


BLOCK = 1 << 17
HEAD = 1 << 12
"""Decompressed bytes that are read to detect the type of a container."""


class ByteSource:
    """The bytes of one file, or of stdin.

    Attributes:
        name: The name used in errors.
        path: The file. None: the bytes can be read only once.
        size: Bytes on disk. None: unknown.
        compression: "", "gzip" or "zstd".
        head: The first decompressed bytes, at most `HEAD`.

    Raises:
        OSError: The file cannot be read.
        MissingArrowError: The file is zstd and pyarrow is not installed.
    """

    def __init__(
        self, name: str, path: Path | None, size: int | None, packed: io.RawIOBase
    ) -> None:
        self.name = name
        self.path = path
        self.size = size
        self._packed = _Replay(b"", packed)
        first, _ = _take(self._packed, 4)
        self.compression = detect_compression(first)
        stream = decompressed(_Replay(first, self._packed), self.compression)
        self.head, fault = _take(stream, HEAD)
        self._encoding: str | None = None
        self._once: io.RawIOBase | None = None
        if path is None:
            self._once = _Replay(self.head, stream, fault)
        else:
            packed.close()

    @classmethod
    def of_file(cls, path: Path) -> "ByteSource":
        """Open a file and read its head. A named pipe is read like stdin."""
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise MissingInputError(
                f"{path}: no such file or folder{fetching_advice(path, 'dataset')}"
            ) from error
        if not path.is_file():
            return cls(path.as_posix(), None, None, file)
        return cls(path.as_posix(), path, path.stat().st_size, file)

    @classmethod
    def of_stdin(cls) -> "ByteSource":
        """Read the head of stdin, without seeking."""
        return cls("stdin", None, None, cast(io.RawIOBase, sys.stdin.buffer))

    @property
    def position(self) -> int:
        """Compressed bytes read so far."""
        return self._packed.position

    def open(self, offset: int = 0) -> BufferedReader:
        """Open the decompressed bytes after the first `offset`, by seeking where possible.

        Raises:
            OSError: The file cannot be read, or stdin is opened a second time.
            InvalidRecordError: The data is damaged before the offset (E102, E108).
        """
        if self.path is None:
            stream, self._once = self._once, None
            if stream is None:
                raise InputError(errno.EINVAL, "Can be read only once", self.name)
        else:
            file = self.path.open("rb", buffering=0)
            if not (self.compression or self._encoding) and file.seekable():
                file.seek(offset)
                self._packed, offset = _Replay(b"", file, None, offset), 0
            else:
                self._packed = _Replay(b"", file)
            stream = decompressed(self._packed, self.compression)
            if self._encoding:
                stream = transcoded(stream, self._encoding)
        reader: BufferedReader = io.BufferedReader(stream, BLOCK)
        while offset > 0 and (skipped := len(reader.read(min(offset, BLOCK)))):
            offset -= skipped
        return reader

    def read_as(self, encoding: str) -> None:
        """Decode the bytes from `encoding`; from now on they are read as UTF-8."""
        self._encoding = encoding
        if self._once is not None:
            text = transcoded(self._once, encoding)
            self.head, fault = _take(text, HEAD)
            self._once = _Replay(self.head, text, fault)
            return
        with self.open() as content:
            self.head, _ = _take(content, HEAD)

    def close(self, *, is_done: bool) -> None:
        """Close the file; with `is_done`, `position` becomes the whole size."""
        if is_done and self.size is not None:
            self._packed.position = self.size
        self._packed.close()


class _Replay(io.RawIOBase):
    """Bytes that were already read, followed by the rest of their stream."""

    def __init__(
        self,
        head: bytes,
        rest: io.RawIOBase,
        fault: InvalidRecordError | None = None,
        position: int = 0,
    ) -> None:
        self._head = head
        self._rest = rest
        self._fault = fault
        self.position = position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._head:
            count = min(len(buffer), len(self._head))
            buffer[:count], self._head = self._head[:count], self._head[count:]
        elif self._fault:
            raise self._fault
        else:
            count = self._rest.readinto(buffer) or 0
        self.position += count
        return count

    def close(self) -> None:
        if cast(object, self._rest) is not sys.stdin.buffer:
            self._rest.close()
        super().close()


def _take(
    stream: io.RawIOBase | BufferedReader, count: int
) -> tuple[bytes, InvalidRecordError | None]:
    """Read `count` bytes, or fewer at the end of the stream or before an error."""
    taken = b""
    try:
        while len(taken) < count and (more := stream.read(count - len(taken))):
            taken += more
    except InvalidRecordError as error:
        return taken, error
    return taken, None


MAX_RECORD_BYTES = 64 << 20
"""A longer line or record is refused (E107): such a file probably has no line ends."""

SPACE = b" \t\r\n"
NO_ROW = "the file is empty, or holds no record"

OTHER_ENCODING = "save the file as UTF-8, or name its encoding, as --encoding cp1252"

Row = dict[str, Any]


class Rows(Protocol):
    """The rows of one container, in order: a file, stdin, or a table in memory.

    Iteration starts at the first row, or at the mark given to `resume_from`. Files and tables can
    be iterated again; stdin and streams of batches cannot.

    Attributes:
        kind: The detected type, for people: "JSON lines, gzip".
    """

    kind: str

    @property
    def blank_lines(self) -> int:
        """Number of blank lines so far."""

    @property
    def name(self) -> str:
        """The name used in errors."""

    @property
    def size(self) -> int | None:
        """Bytes on disk, or rows of a table in memory. None: unknown."""

    @property
    def position(self) -> int:
        """Amount of `size` read so far."""

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each row's source, and the row or its refusal.

        Raises:
            OSError: The file cannot be read (again).
        """

    def columns(self) -> tuple[str, ...] | None:
        """Return the column names; None if each row has its own keys."""

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Yield the number of the first row, from 1, and a `pyarrow.RecordBatch` of ≤ 8,192 rows.

        A refusal replaces each row that is too long. The last item may be a refusal of the
        container itself, if it is damaged or empty.

        Raises:
            TypeError: `columns` is None.
        """

    def mark(self) -> dict[str, Any]:
        """Return, as JSON values, the position after the row or batch that was yielded last."""

    def resume_from(self, mark: dict[str, Any]) -> None:
        """Start the next iteration at a mark of the same data, which may have another name."""


class TextRows(ABC):
    """Base class of containers that are read as text; each row has its own keys.

    A subclass implements `_records` and updates, before each yield, `_offset` (decompressed bytes
    before the next record), `_line` (lines before it) and `_is_empty`: `mark` returns them.
    """

    blank_lines: int
    _offset: int
    _line: int
    _is_empty: bool
    _is_done: bool

    def __init__(self, source: ByteSource, kind: str, max_record_bytes: int) -> None:
        self.kind = f"{kind}, {source.compression}" if source.compression else kind
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
        """Bytes read so far (compressed bytes of a compressed file)."""
        return self._source.position

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each row's source, and the row or its refusal."""
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
        """Raise TypeError: text has no columns."""
        raise TypeError(f"{self.kind} has rows and no columns")

    def mark(self) -> dict[str, Any]:
        """Return the position after the row that was yielded last."""
        return {
            "offset": self._offset,
            "line": self._line,
            "blank_lines": self.blank_lines,
            "is_empty": self._is_empty,
            "is_done": self._is_done,
        }

    def resume_from(self, mark: dict[str, Any]) -> None:
        """Start the next iteration at a mark."""
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
        """Return the refusal that ends the iteration."""
        self._is_empty, self._is_done = False, True
        return self._refused(error.code, error.reason, line=line)
