"""Arrow IPC, files and streams, batch by batch."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from logratio.data.containers.file_tables import FileTable, check_tail
from logratio.data.containers.sources import BLOCK
from logratio.data.containers.table_rows import OpenTable
from logratio.data.records import InvalidRecordError

ARROW_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"
"""The first bytes of an Arrow stream, before the length of its schema."""

MAX_MESSAGE_BYTES = 1 << 30
"""Most bytes of one record batch that is not mapped: packed, or out of stdin."""

_STREAM_END = STREAM_MAGIC + b"\0\0\0\0"


class ArrowFileRows(FileTable):
    """The rows of an Arrow IPC file; its parts are record batches.

    A plain file is mapped into memory, so that a batch may be larger than memory: nobody may
    shorten it while it is read. Otherwise its batches are read in their order.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        path = self._source.path
        if path is None or self._source.packing:
            with self._source.open() as stream:
                stream.read(8)  # the magic, filled up
                yield _streamed(self._library, stream, part, _check_file_end)
            return
        with path.open("rb") as file:
            check_tail(file, ARROW_MAGIC)
        with self._library.memory_map(str(path)) as file:
            reader = self._library.ipc.open_file(file)
            yield tuple(reader.schema.names), self._batches(reader, part)

    def _batches(self, reader: Any, part: int) -> Iterator[tuple[int, Any]]:
        for number in range(part, reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            yield number, batch
            self._share = (number + 1) / reader.num_record_batches


class ArrowStreamRows(FileTable):
    """The rows of an Arrow IPC stream; its parts are record batches. A plain file is mapped.

    A stream without its end mark is one that was cut (E102), though the format would let it pass.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
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
) -> OpenTable:
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
