"""Files that are on the disk when a call returns, and whole under their names."""

import os
import secrets
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its name and rename it: a crash leaves the old one or the new."""
    # No number of the process: those of two hosts on one folder may be the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)
