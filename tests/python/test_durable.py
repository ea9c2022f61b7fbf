"""Atomic writes: a failure leaves the old text, never part of the new."""

from pathlib import Path

import pytest

from logratio import durable
from logratio.durable import sync, write_atomic


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_sync_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nothing")
