"""Decompression bombs: memory is bounded by the largest allowed record."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks are read from /proc"
)

MIB = 1 << 20
PEAK_MIB = 420
"""Memory limit in MiB of a process that reads records of at most 64 MiB: Python and pyarrow, plus
six times the record. The bombs decompress to 2,048 MiB."""

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}
READ = """
import json, sys
from collections import Counter
from pathlib import Path
from logratio.data.readers import open_file
rows = open_file(Path(sys.argv[1]))
counts = Counter(getattr(row, "code", "row") for _, row in rows)
# ru_maxrss would count the memory of the process that started this one.
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
print(json.dumps([counts, peak]))
"""


def read(path: Path) -> tuple[dict[str, int], int]:
    """Read a file in a subprocess; return the counts and its peak memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True
    )
    counts, peak = json.loads(done.stdout)
    return counts, peak


def bomb(path: Path, first: bytes, block: bytes, blocks: int) -> Path:
    """Write a compressed file of a few repeated members."""
    pack = PACK[path.suffix]
    path.write_bytes(pack(first) + pack(block) * blocks)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("name", "block", "blocks", "expected"),
    [
        ("zeros", bytes(64 * MIB), 32, {"row": 1, "E107": 1}),
        ("lines", (bytes(8 * MIB - 1) + b"\n") * 8, 8, {"row": 1, "E101": 64}),
        ("long", bytes(72 * MIB - 1) + b"\n", 8, {"row": 1, "E107": 8}),
    ],
)
def test_two_gibibytes_of_zeros_with_and_without_lines(
    tmp_path: Path, pack: str, name: str, block: bytes, blocks: int, expected: dict[str, int]
) -> None:
    path = bomb(tmp_path / f"{name}.jsonl{pack}", b"{}\n", block, blocks)
    assert path.stat().st_size < 4 * MIB
    counts, peak = read(path)
    assert (counts, peak < PEAK_MIB) == (expected, True), peak


@pytest.mark.slow
@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize(
    ("name", "first", "block", "expected"),
    [
        ("open.json", b'[{},{"a": "', b"x" * 64 * MIB, {"row": 1, "E109": 1}),
        ("deep.json", b"[{},", b"[" * 64 * MIB, {"row": 1, "E109": 1}),
        ("spaces.json", b"[{},", b" " * 64 * MIB, {"row": 1, "E102": 1}),
        ("open.csv", b'a,b\n1,2\n"', (b"x" * 1023 + b"\n") * 65536, {"row": 1, "E111": 1}),
        ("wide.csv", b"a,b\n1,2\n", b"," * 64 * MIB, {"row": 1, "E111": 1}),
        ("body.arrows", b"\xff\xff\xff\xff\xff\xff\xff\x7f", bytes(64 * MIB), {"E108": 1}),
    ],
)
def test_records_that_never_end(
    tmp_path: Path, pack: str, name: str, first: bytes, block: bytes, expected: dict[str, int]
) -> None:
    counts, peak = read(bomb(tmp_path / f"{name}{pack}", first, block, 8))
    assert (counts, peak < PEAK_MIB) == (expected, True), peak


def test_zstd_windows_are_limited(tmp_path: Path) -> None:
    path = tmp_path / "window.jsonl.zst"
    window_of_256_mib = bytes([0, 18 << 3])
    path.write_bytes(b"\x28\xb5\x2f\xfd" + window_of_256_mib + b"\x01\x00\x00")
    counts, _ = read(path)
    assert counts == {"E108": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows"])
def test_tables_are_read_in_small_batches(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    write_large(path, kind)
    counts, peak = read(path)
    assert counts == {"row": 400_000}
    assert peak < PEAK_MIB or kind != "parquet", peak


def write_large(path: Path, kind: str) -> None:
    """Write 800 MB of rows, in one row group or in batches of 20 MB."""
    text = pyarrow.array([f"{i:09}" * 222 for i in range(10_000)])
    table = pyarrow.table({"prompt": text})
    if kind == "parquet":
        with pyarrow.parquet.ParquetWriter(path, table.schema, use_dictionary=False) as writer:
            writer.write_table(pyarrow.concat_tables([table] * 40), row_group_size=400_000)
        return
    new = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
    with new(path, table.schema) as writer:
        for _ in range(40):
            writer.write_table(table)


@pytest.mark.slow
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_text_stored_once_for_every_row(tmp_path: Path, is_nested: bool) -> None:
    """A Parquet dictionary with one text of 5 MB, used 400 times: a few bytes stand for 2 GB."""
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 400, pyarrow.int32()), pyarrow.array(["x" * 5_000_000])
    )
    column = pyarrow.StructArray.from_arrays([text], ["content"]) if is_nested else text
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path, compression="zstd")
    assert path.stat().st_size < 4000
    counts, peak = read(path)
    assert (counts, peak < PEAK_MIB) == ({"row": 400}, True), peak
