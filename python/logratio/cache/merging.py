"""Merge caches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from logratio._rust import CacheFolder
from logratio.cache.identity import (
    FINGERPRINT_FILE,
    StoredReference,
    find_references,
    read_reference,
    record_conditions,
)
from logratio.cache.logps import open_reader
from logratio.cache.results import Change
from logratio.durable import write_atomic
from logratio.errors import LogratioError

KEY_BYTES, COUNT_BYTES, SUM_BYTES, LOGP_BYTES = 32, 4, 8, 4


class MergeError(LogratioError, ValueError):
    """The caches cannot be merged."""


@dataclass(frozen=True)
class Merge:
    """The planned merge of one reference.

    Attributes:
        target: The folder to add to, which may not exist yet.
        sources: Folders of the same reference and kind in other caches.
        completions: Number of records in the sources, an upper bound of those added.
        bytes: Upper bound of the bytes added.
    """

    target: StoredReference
    sources: tuple[StoredReference, ...]
    completions: int
    bytes: int

    def run(self) -> Change:
        """Add the records that the target lacks. The sources are not changed.

        Raises:
            CorruptCacheError: A file is damaged, or two records of one completion contradict each
                other; the message names both files. Nothing is added.
            OSError: The disk is full, or the folder cannot be written. Nothing is added.
        """
        target = self.target
        target.path.mkdir(parents=True, exist_ok=True)
        _record_fingerprints(target.path, self.sources)
        return change(target, open_folder(target).merge([source.path for source in self.sources]))


def open_folder(reference: StoredReference) -> CacheFolder:
    """Open a reference's folder in the Rust core, to verify, merge or compact it."""
    return CacheFolder(
        reference.path,
        reference.digest,
        sums=reference.keeps_sums,
        tolerance=reference.tolerance,
    )


def change(reference: StoredReference, done: Mapping[str, Any]) -> Change:
    """Convert the result of the Rust core to a `Change`."""
    names = {name: tuple(done[name]) for name in ("shards", "removed", "in_use")}
    return Change(reference, done["completions"], done["repeats"], **names)


def plan_merges(root: Path, others: Sequence[Path]) -> list[Merge]:
    """Match the references of other caches with those of `root` by fingerprint.

    Raises:
        MergeError: A cache would be merged into itself, there is nothing to merge, or `root` is the
            folder of one reference and the others contain further references.
        DamagedFingerprintError: A folder's fingerprint was altered.
        CorruptCacheError: A file of another cache is damaged.
        OSError: A folder cannot be read.
    """
    found = [(other, find_references(other)) for other in others]
    if empty := [str(other) for other, references in found if not references]:
        raise MergeError(f"{', '.join(empty)}: no reference cache here")
    sources = [reference for _, references in found for reference in references]
    existing = find_references(root) if root.is_dir() else []
    for reference in [*existing, *sources]:
        reference.check()
    wanted = sorted({(source.digest, source.kind) for source in sources})
    return [
        _plan(root, existing, [source for source in sources if (source.digest, source.kind) == one])
        for one in wanted
    ]


def _plan(root: Path, existing: Sequence[StoredReference], sources: list[StoredReference]) -> Merge:
    target = _target(root, existing, sources[0])
    if any(target.path.resolve() == source.path.resolve() for source in sources):
        raise MergeError(f"{target.path} would be merged into itself: name other caches")
    readers = [open_reader(source) for source in sources]
    records = sum(len(reader) for reader in readers)
    tokens = sum(reader.tokens for reader in readers)
    return Merge(target, tuple(sources), records, entry_bytes(target, records, tokens))


def _target(
    root: Path, existing: Sequence[StoredReference], source: StoredReference
) -> StoredReference:
    for reference in existing:
        if (reference.digest, reference.kind) == (source.digest, source.kind):
            return reference
    if any(reference.path == root for reference in existing):
        raise MergeError(
            f"{root} is the folder of one reference, but {source.path} is of another "
            f"({source.describe()}): merge into the root of the cache instead"
        )
    return replace(source, path=root / source.proper_name)


def entry_bytes(reference: StoredReference, records: int, tokens: int) -> int:
    """Estimate the bytes of records on disk."""
    if reference.keeps_sums:
        return records * (KEY_BYTES + COUNT_BYTES + SUM_BYTES)
    return records * (KEY_BYTES + COUNT_BYTES) + tokens * LOGP_BYTES


def _record_fingerprints(folder: Path, sources: Sequence[StoredReference]) -> None:
    """Copy the readable fingerprint, and all conditions that are not yet recorded."""
    known = read_reference(folder)
    seen = list(known.soft) if known else []
    if not (folder / FINGERPRINT_FILE).exists():
        seen += _write_fingerprint(folder, sources)
    for soft in (soft for source in sources for soft in source.soft):
        if soft not in seen:
            seen.append(soft)
            record_conditions(folder, soft)


def _write_fingerprint(folder: Path, sources: Sequence[StoredReference]) -> list[Mapping[str, Any]]:
    """Write the first readable fingerprint of the sources; return its conditions."""
    for source in sources:
        if source.hard:
            soft = dict(next(iter(source.soft), {}))
            fields = {"digest": source.digest.hex(), "hard": source.hard, "soft": soft}
            write_atomic(folder / FINGERPRINT_FILE, json.dumps(fields, indent=1))
            return [soft]
    return []
