"""Caches made with the writer itself, for tests of what reads them."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from logratio._rust import CacheReader, CacheWriter

BF16 = 16
"""The seed of a reference that computes in bfloat16."""

Records = dict[int, list[float]]


def fingerprint(seed: int = 0, **soft: str) -> dict[str, Any]:
    """A fingerprint as `precompute` writes it, of a model that is no one's."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 1200}
    hard = {
        "version": 1,
        "config": config,
        "weights": f"{seed:064x}",
        "adapter": None,
        "compute_dtype": "bfloat16 autocast over float32" if seed == BF16 else "float32",
    }
    # The rule of the fingerprint's digest, written once more.
    text = json.dumps(hard, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"digest": digest, "hard": hard, "soft": soft or {"torch": "2.11.0"}}


def folder_of(root: Path, seed: int = 0, *, sums: bool = False) -> Path:
    """The folder of one reference below a root, with its fingerprint."""
    recorded = fingerprint(seed)
    name = str(recorded["digest"])[:16]
    folder = root / (f"{name}.sums" if sums else name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fingerprint.json").write_text(json.dumps(recorded, indent=1))
    return folder


def digest(seed: int = 0) -> bytes:
    """The 32 bytes that name a reference."""
    return bytes.fromhex(fingerprint(seed)["digest"])


def keys(*numbers: int) -> NDArray[np.uint8]:
    """Keys `[n, 32]` that ascend with their numbers."""
    return np.array([list(number.to_bytes(32)) for number in numbers], np.uint8).reshape(-1, 32)


def write(root: Path, *blocks: Records, seed: int = 0, seal: bool = False) -> Path:
    """Append blocks of log-probs to one journal, sealed or not; return the folder."""
    folder = folder_of(root, seed)
    writer = CacheWriter(folder, digest(seed))
    for records in blocks:
        offsets = np.cumsum([0, *map(len, records.values())], dtype=np.int64)
        flat = np.array([value for values in records.values() for value in values], np.float32)
        writer.append(keys(*records), offsets, flat)
    writer.seal() if seal else writer.close()
    return folder


def write_sums(root: Path, records: dict[int, tuple[int, float]], *, seed: int = 0) -> Path:
    """Append a block of token counts and sums; return the folder."""
    folder = folder_of(root, seed, sums=True)
    writer = CacheWriter(folder, digest(seed), sums=True)
    counts, sums = zip(*records.values(), strict=True)
    writer.append_sums(keys(*records), np.array(counts, np.uint32), np.array(sums, np.float64))
    writer.close()
    return folder


def random_records(numbers: range, seed: int = 0) -> Records:
    """Log-probs of 1 to 9 tokens, exact in float32, for each number."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 10, len(numbers))
    return {
        number: (-draw.exponential(2.0, length)).astype(np.float32).tolist()
        for number, length in zip(numbers, lengths, strict=True)
    }


def contents(folder: Path, seed: int = 0) -> Records:
    """Everything in a folder of log-probs, by the numbers of the keys, read by the core alone."""
    found, tokens, logps, _ = CacheReader.open(folder, digest(seed)).slice(None, 10**6)
    ends = np.cumsum(tokens)
    parts = [part.tolist() for part in np.split(logps, ends[:-1])]
    numbers = [int.from_bytes(key.tobytes()) for key in found]
    return dict(zip(numbers, parts, strict=True)) if numbers else {}


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)


@contextmanager
def disk_of_128_kib(folder: Path) -> Iterator[Path]:
    """A file system of 128 KiB below a folder, or a skip where nobody may mount one."""
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
