"""A full journal is sealed and a new one started; acknowledged entries are never lost."""

from pathlib import Path

import numpy as np
import pytest

from logratio._rust import CacheReader, CacheWriter
from logratio.training.reference_scorer import Journals

FINGERPRINT = b"\x07" * 32


def keys(start: int, count: int) -> np.ndarray:
    rows = np.zeros((count, 32), np.uint8)
    rows[:, 0] = np.arange(start, start + count)
    return rows


def append_blocks(journals: Journals, blocks: int) -> None:
    """Append blocks of two records of three log-probs, numbered from 0."""
    for block in range(blocks):
        logps = np.full(6, -1.0 - block, np.float32)
        journals.append(
            lambda writer, block=block, logps=logps: writer.append(  # type: ignore[misc]
                keys(2 * block, 2), np.array([0, 3, 6]), logps
            )
        )


def kinds(folder: Path) -> list[str]:
    return sorted(path.name.split(".", 1)[1] for path in folder.iterdir())


def test_a_full_journal_becomes_a_shard(tmp_path: Path) -> None:
    journals = Journals(lambda: CacheWriter(tmp_path, FINGERPRINT), most=600)
    append_blocks(journals, 7)  # 256 bytes each, behind a header of 64: three fill one
    assert kinds(tmp_path) == ["arrow", "arrow", "journal", "manifest.json", "manifest.json"]
    assert journals.nbytes == 3 * 64 + 7 * 256
    reader = CacheReader.open(tmp_path, FINGERPRINT)
    offsets, logps = reader.read(reader.join(keys(0, 14)))
    assert offsets.tolist() == list(range(0, 43, 3))
    assert logps.tolist() == np.repeat(-1.0 - np.arange(7), 6).tolist()
    journals.seal()
    assert kinds(tmp_path) == ["arrow"] * 3 + ["manifest.json"] * 3


def test_the_last_journal_may_stay_unsealed(tmp_path: Path) -> None:
    journals = Journals(lambda: CacheWriter(tmp_path, FINGERPRINT))
    append_blocks(journals, 1)
    journals.close()
    assert kinds(tmp_path) == ["journal"]
    assert len(CacheReader.open(tmp_path, FINGERPRINT)) == 2


def test_a_refused_block_is_not_counted(tmp_path: Path) -> None:
    journals = Journals(lambda: CacheWriter(tmp_path, FINGERPRINT))
    with pytest.raises(ValueError, match="log-prob"):
        journals.append(
            lambda writer: writer.append(keys(0, 1), np.array([0, 1]), np.ones(1, np.float32))
        )
    assert journals.nbytes == 64
