"""A reader written only from rust/store/FORMAT.md reads what the library writes."""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checksums import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from logratio._rust import CorruptStoreError, Store, StoreWriter

BLOCK = 65_536


def test_the_checksum_is_the_named_algorithm() -> None:
    assert crc32c(b"123456789") == 0xE3069283


class StoreFile(NamedTuple):
    """The contents of a file according to FORMAT.md."""

    columns: dict[str, NDArray[Any]]
    metadata: str
    digest: bytes
    blocks: list[range]


def read_store(path: Path) -> StoreFile:
    """Read a store and compare every checksum."""
    data = path.read_bytes()
    magic, version, endian, *counts, length = struct.unpack_from("<8sII6Q", data)
    groups, completions, tokens, counted, characters = counts
    assert (magic, version, endian, length) == (b"LRSTORE3", 3, 0x01020304, len(data))
    digest = data[64:96]
    assert data[96:124] == bytes(28)
    assert struct.unpack_from("<I", data, 124)[0] == crc32c(data[:124])
    at, columns = 128, {}
    for name, dtype, count in (
        ("tokens", "<i4", tokens),
        ("mask", "u1", counted),
        ("prompt_offsets", "<u8", groups + 1),
        ("completion_offsets", "<u8", completions + 1),
        ("group_offsets", "<u8", groups + 1),
        ("roles", "u1", completions),
        ("values", "<f4", 4 * completions),
        ("files", "<u4", groups),
        ("lines", "<u8", groups),
        ("metadata", "u1", characters),
    ):
        columns[name] = np.frombuffer(data, dtype, count, at)
        end = at + columns[name].nbytes
        at = -(-end // 64) * 64
        assert not any(data[end:at]), name
    blocks = [range(max(128, start), min(start + BLOCK, at)) for start in range(0, at, BLOCK)]
    footer = data[-64:]
    assert footer[:32] == digest
    assert struct.unpack_from("<Q", footer, 32)[0] == len(blocks)
    assert struct.unpack_from("<I", footer, 40)[0] == crc32c(data[at:-64])
    assert footer[44:60] == bytes(16)
    assert struct.unpack_from("<I", footer, 60)[0] == crc32c(footer[:60])
    assert len(data) - 64 == -(-(at + 4 * len(blocks)) // 64) * 64
    table = struct.unpack_from(f"<{len(blocks)}I", data, at)
    assert list(table) == [crc32c(data[block.start : block.stop]) for block in blocks]
    return StoreFile(columns, columns.pop("metadata").tobytes().decode(), digest, blocks)


Group = tuple[list[int], list[tuple[list[int], int]]]
ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
groups = st.tuples(ids, st.lists(st.tuples(ids, st.integers(0, 4)), min_size=1, max_size=4))


def values_of(completions: list[tuple[list[int], int]]) -> list[list[float]] | None:
    """Values that follow from the ids; None, as for every third group, means none at all."""
    if len(completions[0][0]) % 3 == 0:
        return None
    return [[float(ids[0] % 7), float("nan"), -0.5, float(role)] for ids, role in completions]


def push(writer: StoreWriter, group: Group, line: int) -> None:
    prompt, completions = group
    flat = [one for tokens, _ in completions for one in tokens]
    values = values_of(completions)
    writer.push(
        np.array(prompt, np.int32),
        np.array(flat, np.int32),
        np.array([one % 2 for one in flat], np.uint8),
        np.array([len(tokens) for tokens, _ in completions], np.uint32),
        np.array([role for _, role in completions], np.uint8),
        line % 3,
        line,
        None if values is None else np.array(values, np.float32),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(dataset=st.lists(groups, max_size=8), metadata=st.text(max_size=9))
def test_the_file_matches_the_format(tmp_path: Path, dataset: list[Group], metadata: str) -> None:
    writer = StoreWriter(tmp_path / "a.store")
    for line, group in enumerate(dataset):
        push(writer, group, line)
    store = writer.finish(metadata)
    file = read_store(tmp_path / "a.store")
    assert (file.digest.hex(), file.metadata) == (store.digest, metadata)
    completions = [one for _, of_group in dataset for one in of_group]
    flat = [one for tokens, _ in completions for one in tokens]
    expected = {
        "tokens": [one for prompt, of in dataset for one in sum((ids for ids, _ in of), prompt)],
        "mask": [one % 2 for one in flat],
        "prompt_offsets": np.cumsum([0, *(len(prompt) for prompt, _ in dataset)]).tolist(),
        "completion_offsets": np.cumsum([0, *(len(tokens) for tokens, _ in completions)]).tolist(),
        "group_offsets": np.cumsum([0, *(len(of) for _, of in dataset)]).tolist(),
        "roles": [role for _, role in completions],
        "values": [
            float(value)
            for _, of in dataset
            for own in values_of(of) or [[float("nan")] * 4] * len(of)
            for value in own
        ],
        "files": [line % 3 for line in range(len(dataset))],
        "lines": list(range(len(dataset))),
    }
    assert file.columns.keys() == expected.keys()
    for name, column in file.columns.items():
        np.testing.assert_array_equal(column, np.array(expected[name], column.dtype), name)
    nan = file.columns["values"].view("<u4")[np.isnan(file.columns["values"])]
    assert (nan == 0x7FC00000).all()
    np.testing.assert_array_equal(store.values().ravel(), file.columns["values"])


def make_long(path: Path) -> Store:
    """Two groups whose ids fill a little more than three blocks."""
    writer = StoreWriter(path)
    for line in range(2):
        push(writer, (list(range(line, 15_000)), [(list(range(12_000)), 3)]), line)
    return writer.finish()


def test_blocks_are_at_the_documented_offsets(tmp_path: Path) -> None:
    """A flipped bit in any block is detected when the block is read, and the block is named."""
    path = tmp_path / "a.store"
    make_long(path)
    data = path.read_bytes()
    blocks = read_store(path).blocks
    assert len(blocks) == 4
    for number, block in enumerate(blocks):
        damaged = bytearray(data)
        damaged[block.stop - 1] ^= 0x10
        (tmp_path / "b.store").write_bytes(damaged)
        store = Store.open(tmp_path / "b.store")
        named = f"bytes {block.start}..{block.stop} "
        with pytest.raises(CorruptStoreError, match=f"block {number}, {named}"):
            [store.group(index) for index in range(2)] and store.metadata
        with pytest.raises(CorruptStoreError, match=f"1 of 4 blocks .* {named}"):
            store.verify()


def test_progress_matches_the_format(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "a.store", deduplicate=True)
    for line in [1, 2, 1, 1]:
        push(writer, ([line], [([5, 6], 0)]), line)
    writer.checkpoint("né")
    folder = tmp_path / "a.store.partial"
    data = (folder / "progress").read_bytes()
    found = struct.unpack_from("<8sII6Q", data)
    assert found == (b"LRSTOREP", 3, 0x01020304, 2, 2, 6, 4, 2, 3)
    assert data[64 + 10 * 32 : -4].decode() == "né"
    assert struct.unpack("<I", data[-4:])[0] == crc32c(data[:-4])
    assert np.fromfile(folder / "repeats", "<u4").tolist() == [0, 0]
    assert np.fromfile(folder / "tokens", "<i4", offset=128).tolist() == [1, 5, 6, 2, 5, 6]
    assert np.fromfile(folder / "completion_offsets", "<u8").tolist() == [0, 2, 4]
