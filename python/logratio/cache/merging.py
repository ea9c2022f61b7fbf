"""One cache takes over what others have."""

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
from logratio.durable import write_whole
from logratio.errors import LogratioError

KEY_BYTES, COUNT_BYTES, SUM_BYTES, LOGP_BYTES = 32, 4, 8, 4


class MergeError(LogratioError, ValueError):
    """Folders cannot become one."""


@dataclass(frozen=True)
class Merge:
    """What one reference's folder is going to take over.

    Attributes:
        target: the folder, which may not be there yet.
        sources: folders of the same reference and kind in other caches.
        completions: records in the sources: no more will be added.
        bytes: what they take at most.
    """

    target: StoredReference
    sources: tuple[StoredReference, ...]
    completions: int
    bytes: int

    def run(self) -> Change:
        """Add what the target lacks. The sources stay as they are.

        Raises:
            CorruptCacheError: a file is damaged, or two records of one completion contradict each
                other; both files are named. Nothing was added.
            OSError: a full disk, a folder that cannot be written; nothing was added.
        """
        target = self.target
        target.path.mkdir(parents=True, exist_ok=True)
        _record_fingerprints(target.path, self.sources)
        return change(target, open_folder(target).merge([source.path for source in self.sources]))


def open_folder(reference: StoredReference) -> CacheFolder:
    """Return what the core does to a reference's folder as a whole."""
    return CacheFolder(
        reference.path,
        reference.digest,
        sums=reference.keeps_sums,
        tolerance=reference.tolerance,
    )


def change(reference: StoredReference, done: Mapping[str, Any]) -> Change:
    """Gather what the Rust core did to a folder."""
    names = {name: tuple(done[name]) for name in ("shards", "removed", "in_use")}
    return Change(reference, done["completions"], done["repeats"], **names)


def plan_merges(root: Path, others: Sequence[Path]) -> list[Merge]:
    """Match the references of other caches with those of `root`, by their fingerprints.

    Raises:
        MergeError: a cache is merged into itself; there is nothing to merge; `root` is the folder
            of one reference, and others have further ones.
        DamagedFingerprintError: a folder's fingerprint was altered.
        CorruptCacheError: a file of another cache is damaged.
        OSError: a folder cannot be read.
    """
    found = [(other, find_references(other)) for other in others]
    if empty := [str(other) for other, references in found if not references]:
        raise MergeError(f"{', '.join(empty)}: no reference cache here")
    sources = [reference for _, references in found for reference in references]
    own = find_references(root) if root.is_dir() else []
    for reference in [*own, *sources]:
        reference.check()
    wanted = sorted({(source.digest, source.kind) for source in sources})
    return [
        _plan(root, own, [source for source in sources if (source.digest, source.kind) == one])
        for one in wanted
    ]


def _plan(root: Path, own: Sequence[StoredReference], sources: list[StoredReference]) -> Merge:
    target = _target(root, own, sources[0])
    if any(target.path.resolve() == source.path.resolve() for source in sources):
        raise MergeError(f"{target.path} would be merged into itself: name other caches")
    readers = [open_reader(source) for source in sources]
    records = sum(len(reader) for reader in readers)
    tokens = sum(reader.tokens for reader in readers)
    return Merge(target, tuple(sources), records, entry_bytes(target, records, tokens))


def _target(root: Path, own: Sequence[StoredReference], source: StoredReference) -> StoredReference:
    for reference in own:
        if (reference.digest, reference.kind) == (source.digest, source.kind):
            return reference
    if any(reference.path == root for reference in own):
        raise MergeError(
            f"{root} is the folder of one reference, and {source.path} is of another "
            f"({source.describe()}): merge into the cache's root above it"
        )
    return replace(source, path=root / source.proper_name)


def entry_bytes(reference: StoredReference, records: int, tokens: int) -> int:
    """Count the bytes that records of so many tokens take on the disk, about."""
    if reference.keeps_sums:
        return records * (KEY_BYTES + COUNT_BYTES + SUM_BYTES)
    return records * (KEY_BYTES + COUNT_BYTES) + tokens * LOGP_BYTES


def _record_fingerprints(folder: Path, sources: Sequence[StoredReference]) -> None:
    """Take over the readable fingerprint, and the conditions of every kind of writer."""
    known = read_reference(folder)
    seen = list(known.soft) if known else []
    if not (folder / FINGERPRINT_FILE).exists():
        seen += _write_fingerprint(folder, sources)
    for soft in (soft for source in sources for soft in source.soft):
        if soft not in seen:
            seen.append(soft)
            record_conditions(folder, soft)


def _write_fingerprint(folder: Path, sources: Sequence[StoredReference]) -> list[Mapping[str, Any]]:
    """Write the first source's fingerprint that is in words; return the conditions in it."""
    for source in sources:
        if source.hard:
            soft = dict(next(iter(source.soft), {}))
            fields = {"digest": source.digest.hex(), "hard": source.hard, "soft": soft}
            write_whole(folder / FINGERPRINT_FILE, json.dumps(fields, indent=1))
            return [soft]
    return []
