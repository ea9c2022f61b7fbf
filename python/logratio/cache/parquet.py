"""Export a reference's log-probs to a Parquet file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from logratio._rust import CacheReader
from logratio.cache.identity import StoredReference
from logratio.cache.logps import open_reader
from logratio.cache.merging import entry_bytes
from logratio.cache.results import Exported
from logratio.durable import published
from logratio.errors import IsFolderError
from logratio.forecast import OutputError, check_writable

GROUP_TOKENS = 2**21
"""Approximate log-probs per row group: 8 MB, which with its compressed copy bounds memory."""
GROUP_ROWS = 2**16
SUM_BYTES = 12

Advance = Callable[[int, int], object]


def export(
    reference: StoredReference,
    path: Path,
    advance: Advance = lambda rows, total: None,
    *,
    overwrite: bool = False,
) -> Exported:
    """Write every completion of a reference once, sorted by key; no partial file is left.

    Columns: `key` (fixed-size binary of 32), `tokens` (uint32), `sum` (float64, nats: over all
    tokens, or over the loss tokens from a folder of sums) and, from a folder of per-token
    log-probs, `logps` (list of float32, nats). The file's metadata identifies the reference:
    `logratio.fingerprint`, `logratio.kind`, and its fields as JSON in `logratio.reference`.

    Args:
        reference: The reference to write.
        path: The file, whose name ends in ``.parquet``.
        overwrite: Replace an existing file, when the new one is complete.
        advance: Called after each row group with its rows and the total number of records.

    Returns:
        The file and its counts.

    Raises:
        OutputError: The name does not end in ``.parquet``, the file exists, or its folder cannot be
            written.
        DamagedFingerprintError: The folder's fingerprint was altered.
        CorruptCacheError: A file is damaged, or two records of one key contradict each other.
        OSError: The disk is full, or the file cannot be written; no partial file remains.
    """
    reference.check()
    if path.is_dir():
        raise IsFolderError(21, "is a folder; name a file to write", str(path))
    if path.suffix != ".parquet":
        raise OutputError(f"{path}: the export is a Parquet file: name it {path.stem}.parquet")
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path}: file exists; replace it with --overwrite, or choose another name"
        )
    reader = open_reader(reference)
    needed = entry_bytes(reference, len(reader), reader.tokens) + SUM_BYTES * len(reader)
    check_writable(path.parent, needed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as partial, partial.open("wb") as file:
        rows, tokens = _write(reference, reader, file, advance)
    return Exported(path, reference, rows, tokens, path.stat().st_size)


def _write(
    reference: StoredReference, reader: CacheReader, file: IO[bytes], advance: Advance
) -> tuple[int, int]:
    import pyarrow.parquet

    schema = _schema(reference)
    writer = pyarrow.parquet.ParquetWriter(
        file, schema, compression="zstd", use_dictionary=False, write_page_checksum=True
    )
    rows = tokens = 0
    try:
        for table in _tables(reader, schema):
            writer.write_table(table)
            rows += table.num_rows
            tokens += int(np.sum(table["tokens"].to_numpy(), dtype=np.int64))
            advance(table.num_rows, len(reader))
        writer.close()
    except BaseException:
        writer.is_open = False  # otherwise its destructor writes the footer to a closed file
        raise
    return rows, tokens


def _schema(reference: StoredReference) -> Any:
    import pyarrow

    fields = [
        pyarrow.field("key", pyarrow.binary(32), nullable=False),
        pyarrow.field("tokens", pyarrow.uint32(), nullable=False),
        pyarrow.field("sum", pyarrow.float64(), nullable=False),
    ]
    if not reference.keeps_sums:
        logps = pyarrow.list_(pyarrow.field("element", pyarrow.float32(), nullable=False))
        fields.append(pyarrow.field("logps", logps, nullable=False))
    fields_of_reference = {
        "hard": dict(reference.hard),
        "soft": [dict(soft) for soft in reference.soft],
    }
    metadata = {
        "logratio.fingerprint": reference.digest.hex(),
        "logratio.kind": reference.kind,
        "logratio.reference": json.dumps(fields_of_reference),
    }
    return pyarrow.schema(fields, metadata)


def _tables(reader: CacheReader, schema: Any) -> Iterator[Any]:
    """Yield the completions in tables of bounded size, sorted by key."""
    import pyarrow

    mean = max(1, reader.tokens // max(1, len(reader)))
    limit = max(1, min(GROUP_ROWS, GROUP_TOKENS // mean))
    after = None
    while True:
        keys, tokens, logps, sums = reader.slice(after, limit)
        if not len(keys):
            return
        after = keys[-1].tobytes()
        key = pyarrow.FixedSizeBinaryArray.from_buffers(
            pyarrow.binary(32), len(keys), [None, pyarrow.py_buffer(keys)]
        )
        columns = [key, tokens]
        if "logps" in schema.names:
            offsets = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
            columns.append(np.add.reduceat(logps, offsets[:-1], dtype=np.float64))
            kind = schema.field("logps").type
            columns.append(pyarrow.ListArray.from_arrays(offsets.astype(np.int32), logps, kind))
        else:
            columns.append(sums)
        yield pyarrow.table([pyarrow.array(column) for column in columns], schema=schema)
