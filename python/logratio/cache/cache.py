"""`ReferenceCache`: the root folder of a cache and the operations on its references."""

from collections.abc import Sequence
from pathlib import Path

from logratio.cache import merging, parquet
from logratio.cache.identity import StoredReference, find_references
from logratio.cache.logps import ReferenceLogps
from logratio.cache.results import CacheFile, Change, Exported, ReferenceReport
from logratio.errors import LogratioError
from logratio.validation import PATH, check_argument


class NoReferenceError(LogratioError, LookupError):
    """The folder has no cache, or not the requested reference."""


class ReferenceCache:
    """A reference cache: the folder of `logratio precompute --cache`, or one reference's folder.

    Any number of processes may write to it at the same time. Methods with a `name` argument use the
    reference whose folder has that name, or all whose names have that prefix; without it, all.

    Args:
        root: The folder.

    Raises:
        SettingTypeError: `root` is not a path.

    Example:
        >>> cache = ReferenceCache("cache")
        >>> for report in cache.inspect():
        ...     print(report.to_text())
        >>> token_counts, sums = cache.open().sums(store.keys())
    """

    def __init__(self, root: str | Path) -> None:
        check_argument("root", PATH, root)
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"ReferenceCache({str(self.root)!r})"

    def references(self, name: str | None = None) -> list[StoredReference]:
        """Return the references in the cache, sorted by name.

        Args:
            name: Only the reference with this name or prefix.

        Raises:
            NoReferenceError: No reference matches; the message lists those in the cache.
            OSError: The folder cannot be read.
        """
        if not self.root.is_dir():
            raise NoReferenceError(f"{self.root}: no such folder")
        found = find_references(self.root)
        if not found:
            raise NoReferenceError(
                f"{self.root}: no reference cache here; `logratio precompute --cache` makes one"
            )
        if name is None:
            return found
        exact = [reference for reference in found if reference.name == name]
        if chosen := exact or [r for r in found if r.name.startswith(name)]:
            return chosen
        raise NoReferenceError(f"{self.root}: no reference is named {name}; {_listed(found)}")

    def reference(self, name: str | None = None, *, sums: bool | None = None) -> StoredReference:
        """Return the only matching reference.

        Args:
            name: Its name or a prefix.
            sums: Whether its folder contains only sums; None: either.

        Raises:
            NoReferenceError: None or several match; the message lists those in the cache.
        """
        found = self.references(name)
        matching = [r for r in found if sums is None or r.keeps_sums == sums]
        if len(matching) == 1:
            return matching[0]
        kind = "" if sums is None else " with sums" if sums else " with per-token log-probs"
        raise NoReferenceError(
            f"{self.root}: {len(matching)} references{kind} match, expected one; {_listed(found)}"
        )

    def inspect(self, name: str | None = None) -> list[ReferenceReport]:
        """Report what the cache contains; checks journals completely, of shards the metadata.

        Args:
            name: Only the reference with this name or prefix.

        Raises:
            NoReferenceError: No reference matches.
            OSError: A folder cannot be read.
        """
        return [_report(reference, every_byte=False) for reference in self.references(name)]

    def verify(self, name: str | None = None) -> list[ReferenceReport]:
        """Check every byte, and that no two records of one completion contradict each other.

        Damage is part of the reports, not an exception.

        Args:
            name: Only the reference with this name or prefix.

        Raises:
            NoReferenceError: No reference matches.
            OSError: A folder cannot be read.
        """
        return [_report(reference, every_byte=True) for reference in self.references(name)]

    def compact(self, name: str | None = None, *, other_hosts: bool = False) -> list[Change]:
        """Rewrite shards and idle journals as a few shards, and remove leftover files.

        Every completion is kept once. Interruption and power failure at any moment lose no record.

        Args:
            name: Only the reference with this name or prefix.
            other_hosts: Also rewrite the journals of other hosts. Set it only if no other host is
                writing: some network file systems do not show their locks.

        Raises:
            NoReferenceError: No reference matches.
            CorruptCacheError: A file is damaged, or two records contradict each other.
            OSError: The disk is full, or the folder cannot be written; nothing is lost.
        """
        chosen = self.references(name)
        for reference in chosen:
            reference.check()
        return [
            merging.change(
                reference, merging.open_folder(reference).compact(other_hosts=other_hosts)
            )
            for reference in chosen
        ]

    def plan_merge(self, others: Sequence[str | Path]) -> list[merging.Merge]:
        """Return what `merge` would add, without changes. Raises the same errors as `merge`."""
        return merging.plan_merges(self.root, [Path(other) for other in others])

    def merge(self, others: Sequence[str | Path]) -> list[Change]:
        """Copy the records that this cache lacks from other caches, which are not changed.

        References are matched by fingerprint; a new reference gets a new folder. Merging the same
        cache again adds nothing.

        Args:
            others: Folders of the other caches.

        Returns:
            One change per reference.

        Raises:
            MergeError: There is nothing to merge, or a cache would be merged into itself.
            DamagedFingerprintError: A folder's fingerprint was altered.
            CorruptCacheError: A file is damaged, or two records of one completion contradict each
                other; the message names the files. Nothing is added to that reference.
            OSError: The disk is full, or a folder cannot be read or written; nothing is lost.
        """
        return [merge.run() for merge in self.plan_merge(others)]

    def export(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        advance: parquet.Advance = lambda rows, total: None,
        overwrite: bool = False,
    ) -> Exported:
        """Write one reference's log-probs as Parquet: `key`, `tokens`, `sum`, `logps`.

        Memory use is bounded, and no partial file is left. See `logratio.cache.parquet`.

        Args:
            path: The file to write.
            name: Name or prefix of the reference; may be omitted if the cache has only one.
            advance: Called after each row group with its rows and the total number of records.
            overwrite: Replace an existing file.

        Raises:
            NoReferenceError: None or several references match.
            OutputError: The name does not end in ``.parquet``, or the file exists.
            DamagedFingerprintError: The folder's fingerprint was altered.
            CorruptCacheError: A file is damaged, or two records contradict each other.
            OSError: The disk is full, or the file cannot be written.
        """
        return parquet.export(self.reference(name), Path(path), advance, overwrite=overwrite)

    def open(
        self, name: str | bytes | None = None, *, sums: bool = False, pread: bool = False
    ) -> ReferenceLogps:
        """Open one reference to read its log-probs or sums by key.

        Args:
            name: Its name, a prefix, or the 32 bytes of its fingerprint's digest; may be omitted
                if the cache has only one.
            sums: Open the folder that contains only sums.
            pread: Read without memory maps, for network file systems.

        Raises:
            NoReferenceError: None or several references match.
            DamagedFingerprintError: The folder's fingerprint was altered.
            CorruptCacheError: A file is damaged.
        """
        if isinstance(name, bytes):
            reference = self._of_digest(name, sums)
        else:
            reference = self.reference(name, sums=sums)
        reference.check()
        return ReferenceLogps(reference, pread=pread)

    def _of_digest(self, digest: bytes, sums: bool) -> StoredReference:
        found = self.references()
        for reference in found:
            if (reference.digest, reference.keeps_sums) == (digest, sums):
                return reference
        raise NoReferenceError(f"{self.root}: no reference {digest.hex()}; {_listed(found)}")


def _report(reference: StoredReference, *, every_byte: bool) -> ReferenceReport:
    folder = merging.open_folder(reference)
    result = folder.verify() if every_byte else folder.inspect()
    files = [
        CacheFile(
            part["name"],
            is_sealed=part["sealed"],
            is_in_use=part["in_use"],
            completions=part["rows"],
            tokens=part["tokens"],
            bytes=part["bytes"],
            torn_bytes=part["torn"],
            problem=part["problem"],
        )
        for part in result["parts"]
    ]
    problems = [*filter(None, [reference.problem]), *_misnamed(reference), *result["problems"]]
    return ReferenceReport(
        reference, tuple(files), result["distinct"], tuple(result["leftovers"]), tuple(problems)
    )


def _misnamed(reference: StoredReference) -> list[str]:
    if reference.problem or reference.name == reference.proper_name:
        return []
    return [
        f"this folder is named {reference.name}, but training looks for {reference.proper_name}: "
        "rename it"
    ]


def _listed(references: Sequence[StoredReference]) -> str:
    named = [f"\n  {r.name} ({r.kind}: {r.describe()})" for r in references]
    return f"name one of{''.join(named)}"
