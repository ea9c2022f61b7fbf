"""The same rows in every container."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from logratio.data.readers import Row

Encode = Callable[[list[Row]], bytes]


def json_lines(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def json_array(rows: list[Row]) -> bytes:
    return b"\xef\xbb\xbf" + json.dumps(rows, indent=1, ensure_ascii=False).encode()


def csv_text(rows: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows
    )
    return text.getvalue().encode()


def parquet(rows: list[Row]) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, file, row_group_size=3, write_page_checksum=True)
    return file.getvalue()


def arrow_file(rows: list[Row], *, new: Any = pyarrow.ipc.new_file) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file.getvalue()


def arrow_stream(rows: list[Row]) -> bytes:
    return arrow_file(rows, new=pyarrow.ipc.new_stream)


ENCODE: dict[str, Encode] = {
    "jsonl": json_lines,
    "json": json_array,
    "csv": csv_text,
    "parquet": parquet,
    "arrow": arrow_file,
    "arrows": arrow_stream,
}


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: bytes(pyarrow.Codec("zstd").compress(content, asbytes=True)),
}


FILES = [(kind, pack) for kind in ENCODE for pack in PACK if kind != "parquet" or not pack]


TABLES = ["arrow", "arrows", "parquet"]
