"""Export to Parquet: exact values, readable by other libraries, no partial files."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow
import pyarrow.parquet
import pytest
from cache_folders import (
    contents,
    digest,
    disk_of_128_kib,
    fingerprint,
    flip,
    folder_of,
    random_records,
    write,
    write_sums,
)

from logratio.cache import CorruptCacheError, ReferenceCache, parquet
from logratio.forecast import OutputError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    with disk_of_128_kib(tmp_path) as place:
        yield place


def test_parquet_contains_what_was_written_for_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 64)
    records = random_records(range(500))
    folder = write(tmp_path / "cache", dict(list(records.items())[::2]), seal=True)
    write(tmp_path / "cache", dict(list(records.items())[1::2]))
    path = tmp_path / "out" / "logps.parquet"
    pieces = []
    done = ReferenceCache(tmp_path / "cache").export(path, advance=lambda *n: pieces.append(n))
    assert (done.rows, done.tokens) == (500, sum(map(len, records.values())))
    assert done.bytes == path.stat().st_size
    assert [rows for rows, _ in pieces] == [64] * 7 + [52]
    wanted = [
        (number.to_bytes(32), len(logps), sum(map(float, logps)), logps)
        for number, logps in records.items()
    ]
    table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
    assert [str(field.type) for field in table.schema] == [
        *("fixed_size_binary[32]", "uint32", "double", "list<element: float not null>"),
    ]
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert same(rows, wanted)
    assert same(polars.read_parquet(path).rows(), wanted)
    assert same(duckdb.read_parquet(str(path)).fetchall(), wanted)
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert metadata["logratio.fingerprint"] == digest().hex()
    assert metadata["logratio.kind"] == "per-token"
    assert json.loads(metadata["logratio.reference"])["hard"] == fingerprint()["hard"]
    assert [p.name for p in path.parent.iterdir()] == ["logps.parquet"]
    assert contents(folder) == records


def same(
    rows: list[tuple[object, ...]], wanted: list[tuple[bytes, int, float, list[float]]]
) -> bool:
    """Compare rows exactly, except the sum, whose order of addition may differ."""
    found = [(bytes(key), tokens, list(logps)) for key, tokens, _, logps in rows]  # type: ignore[call-overload]
    assert found == [(key, tokens, logps) for key, tokens, _, logps in wanted]
    return np.allclose([row[2] for row in rows], [row[2] for row in wanted], rtol=1e-14, atol=0)  # type: ignore[arg-type]


def test_sums_are_exported_without_log_probs_of_tokens(tmp_path: Path) -> None:
    write_sums(tmp_path / "cache", {2: (3, -4.5), 1: (1, -0.25)})
    ReferenceCache(tmp_path / "cache").export(tmp_path / "sums.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "sums.parquet").to_pylist() == [
        {"key": (1).to_bytes(32), "tokens": 1, "sum": -0.25},
        {"key": (2).to_bytes(32), "tokens": 3, "sum": -4.5},
    ]


def test_pages_of_parquet_have_checksums(tmp_path: Path) -> None:
    write(tmp_path / "cache", random_records(range(100)))
    path = tmp_path / "out.parquet"
    ReferenceCache(tmp_path / "cache").export(path)
    sound = path.read_bytes()
    table = pyarrow.parquet.read_table(path)
    silent = 0
    for at in range(4, len(sound) // 2, 7):
        flip(path, at)
        try:
            found = pyarrow.parquet.read_table(path, page_checksum_verification=True)
            silent += found != table
        except (OSError, pyarrow.ArrowException):
            pass
        path.write_bytes(sound)
    assert silent == 0


def test_the_file_is_read_without_our_library(tmp_path: Path) -> None:
    write(tmp_path / "cache", {1: [-1.0, -2.0], 2: [-4.0]}, seal=True)
    ReferenceCache(tmp_path / "cache").export(tmp_path / "out.parquet")
    script = (
        "import sys, duckdb\n"
        "sys.modules['logratio'] = None\n"
        "query = 'select sum(tokens), sum(sum), sum(list_sum(logps)) from read_parquet(?)'\n"
        "print(*duckdb.execute(query, [sys.argv[1]]).fetchone())"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out.parquet")]
    assert subprocess.check_output(command, text=True).split() == ["3", "-7.0", "-7.0"]


def test_a_failed_export_keeps_the_existing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "cache", random_records(range(100)), seal=True)
    cache, path = ReferenceCache(tmp_path / "cache"), tmp_path / "out" / "a.parquet"
    cache.export(path)
    before = path.read_bytes()
    with pytest.raises(
        OutputError, match=r"a\.parquet: file exists; replace it with overwrite=True"
    ):
        cache.export(path)
    with pytest.raises(OutputError, match=r"a\.csv: .* name it a\.parquet"):
        cache.export(path.with_suffix(".csv"))

    def interrupted(rows: int, total: int) -> None:
        assert (rows, total) == (100, 100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.export(path, advance=interrupted, overwrite=True)
    (shard,) = folder.glob("*.arrow")
    flip(shard, 400)
    with pytest.raises(CorruptCacheError, match=shard.name):
        cache.export(path, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["a.parquet"]
    assert path.read_bytes() == before
    with pytest.raises(IsADirectoryError, match="name a file"):
        cache.export(path.parent)


def test_row_groups_are_bounded_for_long_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "GROUP_TOKENS", 100)
    write(tmp_path / "cache", {n: [-1.0] * 40 for n in range(10)})
    write(tmp_path / "long", {n: [-1.0] * 400 for n in range(3)}, seal=True)
    for name, rows in (("cache", [2] * 5), ("long", [1] * 3)):
        ReferenceCache(tmp_path / name).export(tmp_path / f"{name}.parquet")
        metadata = pyarrow.parquet.read_metadata(tmp_path / f"{name}.parquet")
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == rows


def test_a_full_disk_leaves_no_partial_file(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    write(tmp_path, {n: (-draw.random(5000)).tolist() for n in range(20)})
    cache = ReferenceCache(tmp_path / folder_of(tmp_path).name)
    with pytest.raises(OSError, match="are free"):
        cache.export(small_disk / "out.parquet")
    monkeypatch.setattr(parquet, "check_writable", lambda folder, needed: None)
    with pytest.raises(OSError, match="No space") as caught:
        cache.export(small_disk / "out.parquet")
    assert caught.value.errno == 28
    assert list(small_disk.iterdir()) == []
