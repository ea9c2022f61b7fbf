"""Parquet, row group by row group."""

from collections.abc import Iterator
from contextlib import contextmanager
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import Any

from logratio.data.containers.file_tables import FileTable, check_tail
from logratio.data.containers.sources import BLOCK
from logratio.data.containers.table_rows import BATCH_ROWS, OpenTable

PARQUET_MAGIC = b"PAR1"
_BATCH_BYTES = 16 << 20  # about so much of a row group is decoded at a time


class ParquetRows(FileTable):
    """The rows of a Parquet file; its parts are row groups. Page checksums are verified.

    Out of stdin it is written to a temporary file first: its table of contents stands at the end.
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
        """Open for reading page by page, instead of whole columns."""
        return self._library.parquet.ParquetFile(
            file, pre_buffer=False, buffer_size=BLOCK, **settings
        )

    def _batches(self, parquet: Any, file: Any, part: int) -> Iterator[tuple[int, Any]]:
        # Never ask the metadata for a column: damaged statistics end the process there.
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

    A text in it is stored once and may stand in every row, so that stored sizes alone say nothing
    of decoded ones. Where there is no dictionary, it is the longest text of the first row.
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
