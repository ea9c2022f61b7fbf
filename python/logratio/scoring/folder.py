"""A bundle's folder while it is being written: complete under its name, or not there at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from logratio.bundle import MANIFEST, Manifest, read_manifest, verify_files
from logratio.durable import sync


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """Make a folder beside `output`, removed in the end unless it was published.

    Yields:
        The folder, on the same file system, so that renaming it is one step.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, manifest: Manifest, output: Path) -> None:
    """Write the manifest, read everything back, and rename the folder to `output`.

    Raises:
        BundleError: What was written does not read back (a failing disk).
        OSError: The disk is full, or `output` came into being meanwhile.
    """
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    verify_files(folder, read_manifest(folder))
    for path in (*folder.iterdir(), folder):
        sync(path)
    folder.replace(output)
    sync(output.parent)
