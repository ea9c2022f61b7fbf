"""Files that are on the disk when a call returns, and whole under their names."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it becomes `path` where nothing goes wrong, or goes.

    A crash leaves the old file or the new one.
    """
    # No number of the process: those of two hosts on one folder may be the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that comes whole or not at all."""
    with published(path) as partial:
        partial.write_text(text, encoding="utf-8")
