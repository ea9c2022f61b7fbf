"""A reader written only from rust/cache/FORMAT.md reads what the library writes."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from checksums import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from logratio._rust import CacheReader, CacheWriter, CorruptCacheError

FINGERPRINT = bytes(range(32))
BLOCK = 65_536

Records = dict[bytes, tuple[int, list[float]]]
"""By key: the number of tokens, and their log-probs or their sum."""


def signed(header: bytes) -> bool:
    return bool(struct.unpack("<I", header[-4:])[0] == crc32c(header[:-4]))


def padded(length: int) -> int:
    return -(-length // 64) * 64


def read_journal(data: bytes, *, sums: bool) -> tuple[Records, int]:
    """Return the records of a journal and the number of its torn bytes."""
    if len(data) <= 64 and not (len(data) == 64 and signed(data)):
        return {}, len(data)
    magic, version, endian, fingerprint, name, kind = struct.unpack_from("<8sII32sQI", data)
    assert (magic, endian, fingerprint) == (b"LRJOURN1", 0x01020304, FINGERPRINT)
    assert (version, kind) == ((2, 1) if sums else (1, 0)) and signed(data[:64])
    records: Records = {}
    at, number, before = 64, 0, data[60:64]
    while at < len(data):
        header = data[at : at + 64]
        if len(header) < 64 or not signed(header):
            break
        fields = struct.unpack_from("<8sQQQI4sI16s", header)
        payload = data[at + 64 : at + 64 + fields[3]]
        assert fields[:3] == (b"LRBLOCK1", name, number) and fields[5] == before
        assert fields[7] == bytes(16) and fields[3] % 64 == 0
        if len(payload) < fields[3] or crc32c(payload) != fields[6]:
            break
        records |= read_payload(payload, fields[4], sums=sums)
        at, number, before = at + 64 + len(payload), number + 1, header[60:]
    return records, len(data) - at


def read_payload(payload: bytes, count: int, *, sums: bool) -> Records:
    keys = [payload[32 * i : 32 * i + 32] for i in range(count)]
    tokens = struct.unpack_from(f"<{count}I", payload, 32 * count)
    at, records = padded(36 * count), {}
    assert payload[36 * count : at] == bytes(at - 36 * count) and min(tokens) >= 1
    for key, length in zip(keys, tokens, strict=True):
        values = struct.unpack_from("<d" if sums else f"<{length}f", payload, at)
        records[key] = length, list(values)
        at += 8 if sums else 4 * length
    assert len(payload) == padded(at) and payload[at:] == bytes(len(payload) - at)
    return records


def read_manifest(path: Path, *, sums: bool) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    body, checksum = text.rsplit(",\n", 1)
    assert checksum == f'  "crc32c": "{crc32c(body.encode()):08x}"\n}}\n'
    manifest: dict[str, Any] = json.loads(text)
    assert list(manifest)[:4] == ["format", "version", "fingerprint", "kind"]
    assert (manifest["format"], manifest["version"]) == ("logratio.cache", 1)
    assert manifest["fingerprint"] == FINGERPRINT.hex()
    assert manifest["kind"] == ("sums" if sums else "per-token")
    shard = path.parent / manifest["shard"]
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == manifest["sha256"]
    assert shard.stem == manifest["sha256"][:32] == path.name.removesuffix(".manifest.json")
    return manifest


def read_seal(data: bytes, manifest: dict[str, Any], *, sums: bool) -> Records:
    """Read a shard by its seal, and compare every checksum."""
    footer = struct.unpack_from("<I", data, len(data) - 10)[0] + 10
    end = len(data) - footer
    tail = data[end - 128 : end]
    magic, version, endian, fingerprint, rows, tokens, length, total, kind, batches, *crcs = (
        struct.unpack_from("<8sII32s4Q4I", tail)
    )
    assert (magic, version, endian, fingerprint) == (b"LRSHARD1", 1, 0x01020304, FINGERPRINT)
    assert (rows, tokens, total) == (manifest["rows"], manifest["tokens"], len(data))
    assert kind == sums and manifest["bytes"] == len(data)
    assert signed(tail) and tail[96:124] == bytes(28)
    assert manifest["seal"] == struct.unpack_from("<I", tail, 124)[0]
    tables = data[length : end - 128]
    assert crcs == [crc32c(tables), crc32c(data[end:])]
    starts = range(0, length, BLOCK)
    found = [crc32c(data[start : min(start + BLOCK, length)]) for start in starts]
    assert list(struct.unpack_from(f"<{len(starts)}I", tables, 40 * batches)) == found
    assert len(tables) == padded(40 * batches + 4 * len(starts))
    records: Records = {}
    for batch in range(batches):
        records |= read_batch(data, struct.unpack_from("<5Q", tables, 40 * batch), sums=sums)
    assert len(records) == rows and list(records) == sorted(records)
    assert sum(length for length, _ in records.values()) == tokens
    return records


def read_batch(data: bytes, places: tuple[int, ...], *, sums: bool) -> Records:
    rows, keys_at, tokens_at, values_at, count = places
    assert keys_at % 64 == tokens_at % 64 == values_at % 64 == 0
    keys = [data[keys_at + 32 * i : keys_at + 32 * i + 32] for i in range(rows)]
    if sums:
        tokens = struct.unpack_from(f"<{rows}I", data, tokens_at)
        values = struct.unpack_from(f"<{count}d", data, values_at)
        return {key: (t, [v]) for key, t, v in zip(keys, tokens, values, strict=True)}
    ends = struct.unpack_from(f"<{rows + 1}i", data, tokens_at)
    values = struct.unpack_from(f"<{count}f", data, values_at)
    spans = zip(keys, ends, ends[1:], strict=False)
    return {key: (end - start, list(values[start:end])) for key, start, end in spans}


def read_arrow(table: pa.Table, *, sums: bool) -> Records:
    """Return the records of a shard from the table of an Arrow reader."""
    keys = table["key"].to_pylist()
    if sums:
        pairs = zip(table["tokens"].to_pylist(), table["sum"].to_pylist(), strict=True)
        return {key: (t, [v]) for key, (t, v) in zip(keys, pairs, strict=True)}
    lists = table["logps"].to_pylist()
    return {key: (len(logps), logps) for key, logps in zip(keys, lists, strict=True)}


def read_shard(manifest_path: Path, *, sums: bool) -> Records:
    """Read a shard by its seal and with pyarrow, which must agree."""
    manifest = read_manifest(manifest_path, sums=sums)
    path = manifest_path.parent / manifest["shard"]
    data = path.read_bytes()
    records = read_seal(data, manifest, sums=sums)
    table = pa.ipc.open_file(data).read_all()
    table.validate(full=True)
    metadata = table.schema.metadata
    assert metadata[b"logratio.fingerprint"] == FINGERPRINT.hex().encode()
    assert metadata[b"logratio.kind"] == (b"sums" if sums else b"per-token")
    assert read_arrow(table, sums=sums) == records
    return records


def read_cache(folder: Path, *, sums: bool) -> tuple[Records, int]:
    """Return every record of a folder and the number of its torn bytes."""
    records: Records = {}
    torn = 0
    for path in sorted(folder.glob("*.manifest.json")):
        records = read_shard(path, sums=sums) | records
    for path in sorted(folder.glob("*.journal")):
        found, behind = read_journal(path.read_bytes(), sums=sums)
        records, torn = found | records, torn + behind
    return records, torn


def key_of(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def value_of(number: int, at: int) -> float:
    return -0.25 * ((7 * number + at) % 4096)


def record_of(number: int, *, sums: bool) -> tuple[int, list[float]]:
    values = [value_of(number, at) for at in range(number % 5 + 1)]
    return len(values), [sum(values)] if sums else values


def append(writer: CacheWriter, numbers: list[int], *, sums: bool) -> None:
    keys = np.frombuffer(b"".join(map(key_of, numbers)), np.uint8).reshape(-1, 32)
    records = [record_of(number, sums=sums) for number in numbers]
    flat = [value for _, values in records for value in values]
    if sums:
        writer.append_sums(keys, np.array([n for n, _ in records], np.uint32), np.array(flat))
    else:
        offsets = np.cumsum([0, *(n for n, _ in records)]).astype(np.int64)
        writer.append(keys, offsets, np.array(flat, np.float32))


def library_reads(folder: Path, keys: list[bytes], *, sums: bool, pread: bool) -> Records:
    reader = CacheReader.open(folder, FINGERPRINT, sums=sums, pread=pread)
    rows = reader.join(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32))
    if sums:
        counts, values = reader.read_sums(rows)
        pairs = zip(counts.tolist(), values.tolist(), strict=True)
        return {key: (n, [v]) for key, (n, v) in zip(keys, pairs, strict=True)}
    offsets, logps = reader.read(rows)
    spans = zip(keys, offsets[:-1], offsets[1:], strict=True)
    return {key: (end - start, logps[start:end].tolist()) for key, start, end in spans}


BLOCKS = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True), max_size=4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writers=st.lists(st.tuples(BLOCKS, st.booleans()), max_size=4),
    torn=st.binary(max_size=100),
    sums=st.booleans(),
)
def test_a_reader_of_the_format_reads_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory,
    writers: list[tuple[list[list[int]], bool]],
    torn: bytes,
    sums: bool,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    wanted: Records = {}
    for blocks, sealed in writers:
        writer = CacheWriter(folder, FINGERPRINT, sums=sums)
        for numbers in blocks:
            append(writer, numbers, sums=sums)
            wanted |= {key_of(n): record_of(n, sums=sums) for n in numbers}
        if sealed:
            writer.seal()
        writer.close()
    behind = 0
    for path in folder.glob("*.journal"):
        path.write_bytes(path.read_bytes() + torn)
        behind += len(torn)
    assert read_cache(folder, sums=sums) == (wanted, behind)
    for pread in (False, True):
        reader = CacheReader.open(folder, FINGERPRINT, sums=sums, pread=pread)
        assert (reader.distinct(), reader.torn_bytes) == (len(wanted), behind)
        assert library_reads(folder, list(wanted), sums=sums, pread=pread) == wanted


def seal_one(folder: Path, *, sums: bool) -> tuple[Path, Records]:
    """Write a shard with more than one block of checksums."""
    numbers = list(range(3000))
    writer = CacheWriter(folder, FINGERPRINT, sums=sums)
    append(writer, numbers, sums=sums)
    name = writer.seal()
    assert name is not None
    return folder / name, {key_of(n): record_of(n, sums=sums) for n in numbers}


@pytest.mark.parametrize("sums", [False, True])
def test_any_arrow_reader_opens_a_shard(tmp_path: Path, sums: bool) -> None:
    path, wanted = seal_one(tmp_path, sums=sums)
    assert path.stat().st_size > BLOCK
    assert read_cache(tmp_path, sums=sums) == (wanted, 0)
    by_polars = pl.read_ipc(path).to_arrow()
    assert read_arrow(by_polars, sums=sums) == wanted
    frame = pytest.importorskip("pandas").read_feather(path)
    assert list(frame["key"]) == sorted(wanted)
    values: NDArray[Any] = np.concatenate([np.atleast_1d(v) for v in frame.iloc[:, -1]])
    assert values.tolist() == [v for key in sorted(wanted) for v in wanted[key][1]]


def test_duckdb_queries_a_shard(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    path, wanted = seal_one(tmp_path, sums=False)
    shard = pa.ipc.open_file(path).read_all()
    query = "select count(*), sum(len(logps)), sum(list_sum(logps)) from shard"
    rows, tokens, total = duckdb.from_arrow(shard).query("shard", query).fetchall()[0]
    assert rows == len(wanted) and tokens == sum(n for n, _ in wanted.values())
    assert total == pytest.approx(sum(sum(values) for _, values in wanted.values()))


@pytest.mark.parametrize("sums", [False, True])
def test_the_library_detects_damage_that_arrow_does_not(tmp_path: Path, sums: bool) -> None:
    path, wanted = seal_one(tmp_path, sums=sums)
    data = bytearray(path.read_bytes())
    value = struct.pack("<d" if sums else "<f", wanted[max(wanted)][1][0])
    at = data.rindex(value)
    data[at + len(value) - 1] ^= 1
    path.write_bytes(data)
    assert read_arrow(pa.ipc.open_file(path).read_all(), sums=sums) != wanted
    with pytest.raises(CorruptCacheError, match="checksum of bytes"):
        library_reads(tmp_path, list(wanted), sums=sums, pread=True)
