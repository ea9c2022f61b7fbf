"""What tables in files share, whatever their format."""

import io
from typing import BinaryIO

from logratio.data.containers.arrow_library import arrow
from logratio.data.containers.sources import ByteSource
from logratio.data.containers.table_rows import TableRows
from logratio.data.records import InvalidRecordError


class FileTable(TableRows):
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


def check_tail(file: BinaryIO, magic: bytes) -> None:
    """Refuse a file without its last bytes, which are its first ones again."""
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - len(magic)))
    if file.read(len(magic)) != magic:
        raise InvalidRecordError("E102", "the file ends before its table of contents")
    file.seek(0)
