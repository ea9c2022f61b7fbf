"""Parquet and Arrow, in files and out of stdin."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from logratio.data.containers.arrow_library import arrow
from logratio.data.containers.sources import BLOCK, ByteSource
from logratio.data.containers.table_rows import BATCH_ROWS, Opened, TableRows
from logratio.data.records import InvalidRecordError

PARQUET_MAGIC, ARROW_MAGIC = b"PAR1", b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"
"""The first bytes of an Arrow stream, before the length of its schema."""

MAX_MESSAGE_BYTES = 1 << 30
"""Most bytes of one record batch that is not mapped: packed, or out of stdin."""

_BATCH_BYTES = 16 << 20  # about so much of a row group is decoded at a time
_STREAM_END = STREAM_MAGIC + b"\0\0\0\0"


class _FileTable(TableRows):
    """Base of the tables that lie in a file."""

    def __init__(self, source: ByteSource, kind: str, max_record_bytes: int) -> None:
        if source.packing:
            kind = f"{kind}, {source.packing}"
        super().__init__(source.name, kind, max_record_bytes)
        self._source = source
        self._library = arrow(kind)
        self._share = 0.0  # of the file that was read

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for stdin."""
        return self._source.size

    @property
    def position(self) -> int:
        """Bytes read so far, about."""
        if self.size is None or self._source.packing:
            return self._source.position
        return self.size if self._is_done else int(self.size * self._share)


class ParquetRows(_FileTable):
    """The rows of a Parquet file; its parts are row groups. Page checksums are verified.

    Out of stdin it is written to a temporary file first: its table of contents stands at the end.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[Opened]:
        with self._seekable() as file:
            _check_tail(file, PARQUET_MAGIC)
            with self._library.parquet.ParquetFile(
                self._library.PythonFile(file, mode="r"),
                page_checksum_verification=True,
                pre_buffer=False,
                buffer_size=BLOCK,
            ) as parquet:
                names = tuple(parquet.schema_arrow.names)
                yield names, self._batches(parquet, part)

    @contextmanager
    def _seekable(self) -> Iterator[Any]:
        if self._source.path is not None:
            with self._source.path.open("rb") as file:
                yield file
            return
        with TemporaryFile() as copy, self._source.open() as stream:
            copyfileobj(stream, copy, BLOCK)
            yield copy

    def _batches(self, parquet: Any, part: int) -> Iterator[tuple[int, Any]]:
        groups = parquet.metadata.num_row_groups
        for group in range(part, groups):
            rows = _batch_rows(parquet.metadata.row_group(group))
            for batch in parquet.iter_batches(rows, row_groups=[group], use_threads=False):
                yield group, batch
            self._share = (group + 1) / groups


class ArrowFileRows(_FileTable):
    """The rows of an Arrow IPC file; its parts are record batches.

    A plain file is mapped into memory, so that a batch may be larger than memory: nobody may
    shorten it while it is read. Otherwise its batches are read in their order.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[Opened]:
        path = self._source.path
        if path is None or self._source.packing:
            with self._source.open() as stream:
                stream.read(8)  # the magic, filled up
                yield _streamed(self._library, stream, part, _check_file_end)
            return
        with path.open("rb") as file:
            _check_tail(file, ARROW_MAGIC)
        with self._library.memory_map(str(path)) as file:
            reader = self._library.ipc.open_file(file)
            yield tuple(reader.schema.names), self._batches(reader, part)

    def _batches(self, reader: Any, part: int) -> Iterator[tuple[int, Any]]:
        for number in range(part, reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            yield number, batch
            self._share = (number + 1) / reader.num_record_batches


class ArrowStreamRows(_FileTable):
    """The rows of an Arrow IPC stream; its parts are record batches. A plain file is mapped.

    A stream without its end mark is one that was cut (E102), though the format would let it pass.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[Opened]:
        if self._source.path is None or self._source.packing:
            with self._source.open() as stream:
                yield _streamed(self._library, stream, part, _check_stream_end)
            return
        with self._library.memory_map(str(self._source.path)) as file:
            reader = self._library.ipc.open_stream(file)
            yield tuple(reader.schema.names), self._mapped(reader, file, part)

    def _mapped(self, reader: Any, file: Any, part: int) -> Iterator[tuple[int, Any]]:
        size = self.size or 1
        for number, batch in _numbered(reader, part):
            yield number, batch
            self._share = file.tell() / size
        file.seek(max(0, file.tell() - len(_STREAM_END)))
        _check_stream_end(file.read(len(_STREAM_END)), file)


class _Counted(io.RawIOBase):
    """A stream that refuses to hand out more than one message may hold, and knows its last bytes.

    A damaged length would else be believed, and memory of that size be taken.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self.last = b""
        self._stream = stream

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_MESSAGE_BYTES:
            reason = f"a record batch of more than {MAX_MESSAGE_BYTES:,} bytes, or a wrong length"
            raise InvalidRecordError("E108", reason)
        content = self._stream.read(size)
        self.last = (self.last + content)[-len(_STREAM_END) :]
        return content


def _streamed(
    library: Any,
    stream: io.BufferedReader,
    part: int,
    check_end: Callable[[bytes, Any], None],
) -> Opened:
    """Read batches one after the other."""
    counted = _Counted(stream)
    reader = library.ipc.open_stream(library.PythonFile(counted, mode="r"))

    def batches() -> Iterator[tuple[int, Any]]:
        yield from _numbered(reader, part)
        check_end(counted.last, stream)

    return tuple(reader.schema.names), batches()


def _numbered(reader: Any, part: int) -> Iterator[tuple[int, Any]]:
    for number, batch in enumerate(reader):
        if number >= part:
            batch.validate(full=True)
            yield number, batch


def _batch_rows(group: Any) -> int:
    """Return how many of a row group's rows are decoded at a time."""
    bytes_per_row = int(group.total_byte_size) // max(int(group.num_rows), 1) + 1
    return max(1, min(BATCH_ROWS, _BATCH_BYTES // bytes_per_row))


def _check_tail(file: BinaryIO, magic: bytes) -> None:
    """Refuse a file without its last bytes, which are its first ones again."""
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - len(magic)))
    if file.read(len(magic)) != magic:
        raise InvalidRecordError("E102", "the file ends before its table of contents")
    file.seek(0)


def _check_stream_end(last: bytes, _rest: Any) -> None:
    if last != _STREAM_END:
        raise InvalidRecordError("E102", "the stream ends without its end mark")


def _check_file_end(last: bytes, rest: Any) -> None:
    """Read over the table of contents that follows the batches."""
    _check_stream_end(last, rest)
    tail = b""
    while more := rest.read(BLOCK):
        tail = (tail + more)[-len(ARROW_MAGIC) :]
    if tail != ARROW_MAGIC:
        raise InvalidRecordError("E102", "the file ends before its table of contents")
