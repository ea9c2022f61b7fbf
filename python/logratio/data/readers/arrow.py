"""Parquet, Arrow files and Arrow streams, batch by batch."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import Any

from logratio.data.readers.rows import BLOCK
from logratio.data.readers.tables import BATCH_ROWS, FileTable, OpenTable, check_tail
from logratio.data.records import InvalidRecordError

ARROW_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"
"""The first bytes of an Arrow stream, before the length of its schema."""

MAX_MESSAGE_BYTES = 1 << 30
"""Most bytes of a record batch that is not memory-mapped (compressed data, stdin)."""

_STREAM_END = STREAM_MAGIC + b"\0\0\0\0"


class ArrowFileRows(FileTable):
    """The rows of an Arrow IPC file; its parts are record batches.

    An uncompressed file is memory-mapped, so a batch may be larger than memory; the file must not
    be truncated while it is read. Other inputs are read batch by batch.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        path = self._source.path
        if path is None or self._source.compression:
            with self._source.open() as stream:
                stream.read(8)  # the magic bytes and their padding
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
    """The rows of an Arrow IPC stream; its parts are record batches.

    An uncompressed file is memory-mapped. A stream without an end mark counts as truncated (E102),
    although the format allows it.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        if self._source.path is None or self._source.compression:
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
    """A stream that limits the size of one read and keeps its last bytes.

    Without the limit, a damaged length would allocate that much memory.
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
    """Read the batches in order, then check the end."""
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
    """Skip the table of contents after the batches and check the last magic bytes."""
    _check_stream_end(last, rest)
    tail = b""
    while more := rest.read(BLOCK):
        tail = (tail + more)[-len(ARROW_MAGIC) :]
    if tail != ARROW_MAGIC:
        raise InvalidRecordError("E102", "the file ends before its table of contents")


PARQUET_MAGIC = b"PAR1"
_BATCH_BYTES = 16 << 20  # approximate bytes of a row group that are decoded at a time


class ParquetRows(FileTable):
    """The rows of a Parquet file; its parts are row groups. Page checksums are verified.

    Stdin is first copied to a temporary file, because the table of contents is at the end.
    """

    @contextmanager
    def _opened(self, part: int) -> Iterator[OpenTable]:
        with self._seekable() as file:
            check_tail(file, PARQUET_MAGIC)
            shared = self._library.PythonFile(file, mode="r")
            with self._parquet(shared, page_checksum_verification=True) as parquet:
                names = tuple(parquet.schema_arrow.names)
                yield names, self._batches(parquet, shared, part)

    @contextmanager
    def _seekable(self) -> Iterator[Any]:
        if self._source.path is not None:
            with self._source.path.open("rb") as file:
                yield file
            return
        with TemporaryFile() as copy, self._source.open() as stream:
            copyfileobj(stream, copy, BLOCK)
            yield copy

    def _parquet(self, file: Any, **settings: Any) -> Any:
        """Open for reading page by page instead of column by column."""
        return self._library.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=BLOCK, **settings
        )

    def _batches(self, parquet: Any, file: Any, part: int) -> Iterator[tuple[int, Any]]:
        # Do not access column metadata: damaged statistics abort the process there.
        schema, groups = parquet.schema, parquet.metadata.num_row_groups
        columns = [schema.column(number) for number in range(len(schema))]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        coded = self._parquet(file, metadata=parquet.metadata, read_dictionary=texts)
        for group in range(part, groups):
            about = parquet.metadata.row_group(group)
            bytes_per_row = int(about.total_byte_size) // max(int(about.num_rows), 1) + 1
            bytes_per_row += sum(_longest_entry(coded, group, path) for path in texts)
            rows = max(1, min(BATCH_ROWS, _BATCH_BYTES // bytes_per_row))
            for batch in parquet.iter_batches(rows, row_groups=[group], use_threads=False):
                yield group, batch
            self._share = (group + 1) / groups


def _longest_entry(reader: Any, group: int, path: str) -> int:
    """Return the bytes of the longest text in one column's dictionary.

    A dictionary stores a text once, but every row may repeat it, so stored sizes do not bound
    decoded sizes. Without a dictionary, the result is the longest text of the first row.
    """
    first = next(reader.iter_batches(1, row_groups=[group], columns=[path]), None)
    return 0 if first is None else max(map(_longest, first.columns), default=0)


def _longest(array: Any) -> int:
    """Return the bytes of the longest text in the dictionaries inside an array."""
    if hasattr(array, "dictionary"):
        return max((len(entry.as_buffer() or b"") for entry in array.dictionary), default=0)
    if hasattr(array, "flatten") and array.type.num_fields:
        parts = array.flatten()
        parts = parts if isinstance(parts, list) else [parts]
        return max(map(_longest, parts), default=0)
    return 0
