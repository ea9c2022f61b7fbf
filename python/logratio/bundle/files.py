"""Open and verify the files of a bundle's folder, without following links."""

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from logratio.errors import LogratioError

MANIFEST = "bundle.json"
SIGNATURE = "bundle.json.sig"
GRAPH = "scorer.onnx"
WEIGHTS = "scorer.onnx.data"
ADAPTER = "adapter.onnx_adapter"
"""The policy of a bundle whose graph is in the bundle of its base model."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
FILE_NAMES = frozenset({GRAPH, WEIGHTS, ADAPTER, *TOKENIZER_FILES})
SIZE_LIMITS: Mapping[str, int] = {
    GRAPH: 2**31 - 1,  # a protobuf message cannot be larger
    WEIGHTS: 2**44,
    ADAPTER: 2**35,
    "tokenizer.json": 2**28,
    "tokenizer_config.json": 2**24,
    "special_tokens_map.json": 2**20,
    "chat_template.jinja": 2**20,
}
"""Largest size of each file in bytes; tokenizers of the largest vocabularies have 35 MB."""


class BundleError(LogratioError, ValueError):
    """The folder is not a bundle, was altered, or has a newer format."""


@dataclass(frozen=True)
class FileEntry:
    """The size of a file in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


def describe_file(path: Path) -> FileEntry:
    """Return the size and hash of a file."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def check_entries(files: Mapping[str, FileEntry], where: str, *, has_graph: bool = True) -> None:
    """Check the names and sizes of the files that a manifest lists.

    Args:
        files: The entries by name.
        where: The manifest's path, for messages.
        has_graph: Whether the bundle has a graph, and not an adapter for that of its base.

    Raises:
        BundleError: A name is not that of a bundle's file, a needed file is not listed, or a size
            is impossible.
    """
    for name, entry in files.items():
        if name not in FILE_NAMES:
            raise BundleError(f"{where}: lists {name!r}, which is not a file of a bundle")
        if not 0 <= entry.size <= SIZE_LIMITS[name]:
            raise BundleError(
                f"{where}: {name} has {entry.size} bytes; the limit is {SIZE_LIMITS[name]}"
            )
    model, other = (GRAPH, {ADAPTER}) if has_graph else (ADAPTER, {GRAPH, WEIGHTS})
    for name in (model, TOKENIZER_FILES[0]):
        if name not in files:
            raise BundleError(f"{where}: does not list {name}")
    for name in sorted(other & files.keys()):
        raise BundleError(f"{where}: lists {name}, which a bundle with {model} has not")


def verify_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Check that a folder contains exactly the files that its manifest lists.

    Each must be a regular file of the listed size and SHA-256. Symbolic links and hard links are
    refused, because they could bring in files from elsewhere. The manifest's signature may also be
    present.

    Args:
        folder: The bundle.
        files: The manifest's entries by name.

    Raises:
        BundleError: A file breaks a rule; the message names both.
    """
    present = {entry.name for entry in folder.iterdir()} - {MANIFEST, SIGNATURE}
    for name in sorted(present - files.keys()):
        raise BundleError(f"{folder / name}: not listed in {MANIFEST}")
    for name in sorted(files.keys() - present):
        raise BundleError(f"{folder / name}: missing")
    for name, entry in sorted(files.items()):
        _verify_file(folder, name, entry)


def _verify_file(folder: Path, name: str, entry: FileEntry) -> None:
    descriptor = open_regular_file(folder, name)
    with os.fdopen(descriptor, "rb") as file:
        if (size := os.fstat(descriptor).st_size) != entry.size:
            raise BundleError(f"{folder / name}: {size} bytes instead of {entry.size}")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise BundleError(f"{folder / name}: altered (its SHA-256 differs from the manifest)")


def read_regular_file(folder: Path, name: str, limit: int) -> bytes:
    """Read a whole file of the folder.

    Args:
        folder: The bundle.
        name: The file's name.
        limit: Largest size in bytes.

    Raises:
        BundleError: The file is larger, is a link or cannot be opened.
    """
    with os.fdopen(open_regular_file(folder, name), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise BundleError(f"{folder / name}: larger than {limit} bytes")
    return content


def open_regular_file(folder: Path, name: str) -> int:
    """Open a regular file of the folder for reading, and return its descriptor.

    Symbolic links and hard links are refused, because they could bring in files from elsewhere.

    Raises:
        BundleError: The file cannot be opened, or is a link, a folder or a device.
    """
    path = folder / name
    try:
        _check_regular(path, path.lstat())  # opening a device or a pipe may have effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BundleError(f"{path}: cannot be opened as a regular file") from error
    try:
        _check_regular(path, os.fstat(descriptor))  # it may have been replaced
    except BundleError:
        os.close(descriptor)
        raise
    return descriptor


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise BundleError(f"{path}: not a regular file with a single name (a link?)")
