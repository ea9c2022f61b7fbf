"""The reference cache: durable appends, sealing, opening and joining, reading rows.

    python benches/bench_cache.py [--only NAME …] [--folder DIR] [--keys 10000000]

`append` writes sums and log-probs in durable blocks, alternating with a plain file that is written
and synced in the same blocks. `seal` converts a journal to a shard, compared with a plain copy.
`join` opens a cache of `--keys` completions and joins as many keys in a separate process, and
measures its peak memory. `rows` reads random rows as numpy batches. Raw rows go to
results/cache.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from logratio._rust import CacheReader, CacheWriter

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cache.jsonl"
FINGERPRINT = bytes(range(32))
ROUNDS = 5
TOKENS = 100
"""Log-probs per completion, typical of a chat answer."""
BATCH = 4096
"""Rows per read."""

Row = dict[str, Any]

JOINS = """
import sys, threading, time
from pathlib import Path
import numpy as np
from logratio._rust import CacheReader

def memory(name):
    lines = map(str.split, Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == name + ":")

def watch():
    global anonymous, resident
    while not done.wait(0.01):
        anonymous = max(anonymous, memory("RssAnon"))
        resident = max(resident, memory("VmRSS"))

keys = np.load(sys.argv[2])
keys = keys[np.random.default_rng(1).permutation(len(keys))]
base = memory("VmRSS")
anonymous = resident = 0
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
reader = CacheReader.open(sys.argv[1], bytes(range(32)))
opened = time.perf_counter()
rows = reader.join(keys)
joined = time.perf_counter()
done.set()
watcher.join()
assert (rows >= 0).all()
print(opened - start, joined - opened, resident - base + keys.nbytes)
"""


def random_keys(count: int, seed: int) -> np.ndarray:
    """Return random keys, uniform like hashes, `[count, 32]`."""
    words = np.random.default_rng(seed).integers(0, 2**64, (count, 4), dtype=np.uint64)
    return words.view(np.uint8)


def fill(writer: CacheWriter, keys: np.ndarray, tokens: int, block: int) -> None:
    """Append `tokens` log-probs for each key, in blocks of `block` completions."""
    logps = -np.random.default_rng(2).random(block * tokens, dtype=np.float32)
    for start in range(0, len(keys), block):
        own = keys[start : start + block]
        offsets = np.arange(len(own) + 1, dtype=np.int64) * tokens
        writer.append(own, offsets, logps[: len(own) * tokens])


def append_sums(folder: Path, block: int) -> Row:
    """Time durable blocks of sums."""
    keys = random_keys(100 * block, 0)
    tokens, sums = np.full(block, TOKENS, np.uint32), np.full(block, -1.5 * TOKENS)
    writer = CacheWriter(folder, FINGERPRINT, sums=True)
    start = perf_counter()
    for at in range(0, len(keys), block):
        writer.append_sums(keys[at : at + block], tokens, sums)
    seconds = perf_counter() - start
    return {"block": block, "completions_per_s": len(keys) / seconds}


def append_logps(folder: Path, block: int) -> Row:
    """Time durable blocks of log-probs, and a plain file synced as often."""
    keys = random_keys(40 * block, 0)
    writer = CacheWriter(folder, FINGERPRINT)
    start = perf_counter()
    fill(writer, keys, TOKENS, block)
    seconds = perf_counter() - start
    written = writer.file_bytes
    plain = plain_write(folder / "plain", written, 40)
    return {
        "block": block,
        "bytes_per_s": written / seconds,
        "plain_bytes_per_s": written / plain,
        "share_of_plain": plain / seconds,
    }


def plain_write(path: Path, total: int, blocks: int) -> float:
    """Return the seconds to write and sync as many bytes in as many blocks."""
    chunk = os.urandom(1 << 16) * (total // blocks // (1 << 16) + 1)
    chunk = chunk[: total // blocks]
    with path.open("wb", buffering=0) as file:
        start = perf_counter()
        for _ in range(blocks):
            file.write(chunk)
            os.fdatasync(file.fileno())
        seconds = perf_counter() - start
    path.unlink()
    return seconds


def bench_append(root: Path, _keys: int) -> Iterator[Row]:
    """Yield rates of durable appends, alternating."""
    for turn in range(ROUNDS):
        for block in (1024, 16384):
            folder = root / f"append-{turn}-{block}"
            yield {"name": "append sums", "turn": turn} | append_sums(folder / "sums", block)
        for block in (655, 10486):  # 256 KiB and 4 MiB of log-probs
            folder = root / f"append-{turn}-{block}"
            yield {"name": "append log-probs", "turn": turn} | append_logps(folder, block)


def bench_seal(root: Path, _keys: int) -> Iterator[Row]:
    """Yield the time to convert a journal to a shard."""
    for turn in range(ROUNDS):
        folder = root / f"seal-{turn}"
        writer = CacheWriter(folder, FINGERPRINT)
        fill(writer, random_keys(500_000, turn), TOKENS, 10486)
        size = writer.file_bytes
        start = perf_counter()
        writer.seal()
        seconds = perf_counter() - start
        yield {"name": "seal", "turn": turn, "completions": 500_000, "bytes_per_s": size / seconds}


def sealed(root: Path, count: int, tokens: int) -> tuple[Path, np.ndarray]:
    """Create a cache of `count` completions from journals of a million."""
    folder, keys = root / f"sealed-{count}-{tokens}", random_keys(count, 3)
    for start in range(0, count, 1_000_000):
        writer = CacheWriter(folder, FINGERPRINT)
        fill(writer, keys[start : start + 1_000_000], tokens, 65536)
        writer.seal()
    return folder, keys


def bench_join(root: Path, count: int) -> Iterator[Row]:
    """Yield the time and memory of opening and joining, from 10,000 keys."""
    sizes = [10**power for power in range(4, 9) if 10**power < count] + [count]
    for size in sizes:
        folder, keys = sealed(root, size, 8)
        path = root / "keys.npy"
        np.save(path, keys)
        for turn in range(3):
            command = [sys.executable, "-c", JOINS, str(folder), str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            opened, joined, memory = map(float, done.stdout.split())
            yield {
                "name": "open and join",
                "turn": turn,
                "keys": size,
                "shards": len(list(folder.glob("*.arrow"))),
                "open_s": opened,
                "join_s": joined,
                "bytes_per_key": memory / size,
            }


def bench_rows(root: Path, _keys: int) -> Iterator[Row]:
    """Yield the rate of reading a million rows in random order."""
    for tokens in (20, TOKENS, 300):
        count = 1_000_000 if tokens < 300 else 300_000
        folder, keys = sealed(root, count, tokens)
        reader = CacheReader.open(folder, FINGERPRINT)
        rows = reader.join(keys)
        order = np.random.default_rng(4).permutation(rows)
        for turn in range(ROUNDS + 1):
            start = perf_counter()
            for at in range(0, count, BATCH):
                reader.read(order[at : at + BATCH])
            seconds = perf_counter() - start
            yield {
                "name": "rows",
                "turn": turn,  # 0: also verifies the blocks' checksums
                "tokens": tokens,
                "rows_per_s": count / seconds,
                "bytes_per_s": 4 * tokens * count / seconds,
            }


BENCHES = {"append": bench_append, "seal": bench_seal, "join": bench_join, "rows": bench_rows}


def summarize(rows: list[Row]) -> None:
    """Print the median of every measure per kind of row."""
    measures = ("_per_s", "_s", "_per_key", "share_of_plain")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        case = [f"{key} {row[key]:,}" for key in ("block", "keys", "tokens") if key in row]
        groups.setdefault(" ".join([row["name"], *case]), []).append(row)
    for name, group in groups.items():
        names = [key for key in group[0] if key.endswith(measures)]
        values = [f"{key} {median(row[key] for row in group):,.3g}" for key in names]
        print(f"{name}: {', '.join(values)}")


def main() -> None:
    """Run the selected benches, and store every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--keys", type=int, default=10_000_000)
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.only:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for row in BENCHES[name](Path(folder), options.keys):
                rows.append(row)
                print(row, flush=True)
    with RESULTS.open("a") as results:
        for row in rows:
            results.write(json.dumps({"date": date.today().isoformat()} | row) + "\n")
    summarize(rows)


if __name__ == "__main__":
    main()
