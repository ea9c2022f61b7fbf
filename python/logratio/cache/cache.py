"""A cache's root: the folders of all its references, and what can be done with them."""

from collections.abc import Sequence
from pathlib import Path

from logratio.cache import merging, parquet
from logratio.cache.identity import StoredReference, find_references
from logratio.cache.logps import ReferenceLogps
from logratio.cache.results import CacheFile, Change, Exported, ReferenceReport
from logratio.errors import LogratioError


class NoReferenceError(LogratioError, LookupError):
    """There is no cache here, or not the reference that was asked for."""


class ReferenceCache:
    """The folder that `logratio precompute --cache` fills, or the folder of one reference in it.

    Any number of processes may write into it meanwhile. Methods that take `name` work on the one
    reference whose folder has that name, or on all whose names begin so; without it, on all.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def references(self, name: str | None = None) -> list[StoredReference]:
        """Return the references that are in it, by name.

        Raises:
            NoReferenceError: There is none, or none of that name; says which there are.
            OSError: The folder cannot be read.
        """
        if not self.root.is_dir():
            raise NoReferenceError(f"{self.root}: there is no such folder")
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
        """Return the only reference that fits.

        Args:
            name: Its name, or how it begins.
            sums: Whether its folder keeps sums only; None: it does not matter.

        Raises:
            NoReferenceError: None fits, or several do; says which there are.
        """
        found = self.references(name)
        fitting = [r for r in found if sums is None or r.keeps_sums == sums]
        if len(fitting) == 1:
            return fitting[0]
        kind = "" if sums is None else " with sums" if sums else " with log-probs of every token"
        wanted = f"{len(fitting)} references{kind} fit, and one is wanted"
        raise NoReferenceError(f"{self.root}: {wanted}; {_listed(found)}")

    def inspect(self, name: str | None = None) -> list[ReferenceReport]:
        """Say what is in it: all of the journals is checked, and the seals of the shards.

        Raises:
            NoReferenceError: No such reference.
            OSError: A folder cannot be read.
        """
        return [_report(reference, every_byte=False) for reference in self.references(name)]

    def verify(self, name: str | None = None) -> list[ReferenceReport]:
        """Compare every byte with what was written, and records of one completion with each other.

        Raises:
            NoReferenceError: No such reference.
            OSError: A folder cannot be read.
        """
        return [_report(reference, every_byte=True) for reference in self.references(name)]

    def compact(self, name: str | None = None, *, other_hosts: bool = False) -> list[Change]:
        """Rewrite shards and idle journals as few shards, each completion once; leftovers go.

        At any moment, and after a loss of power at any moment, every record is in a file.

        Args:
            name: Which reference.
            other_hosts: Take the journals of other hosts too: nobody writes there any more. Some
                network file systems do not show their locks.

        Raises:
            NoReferenceError: No such reference.
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
        """Say what `merge` would take over; it changes nothing. Raises what `merge` does."""
        return merging.plan_merges(self.root, [Path(other) for other in others])

    def merge(self, others: Sequence[str | Path]) -> list[Change]:
        """Take over what other caches have and this one lacks; they stay as they are.

        References are matched by fingerprint; one that is not here yet gets a folder. Merging
        again what was merged adds nothing.

        Raises:
            MergeError: There is nothing to merge, or it would be merged into itself.
            DamagedFingerprintError: A folder's fingerprint was altered.
            CorruptCacheError: A file is damaged, or two records of one completion contradict each
                other; names the files. To that reference nothing was added.
            OSError: The disk is full, or a folder cannot be read or written; nothing is lost.
        """
        return [merge.run() for merge in self.plan_merge(others)]

    def export(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        advance: parquet.Advance = lambda rows, total: None,
    ) -> Exported:
        """Write one reference's log-probs as Parquet: `key`, `tokens`, `sum`, `logps`.

        Memory stays bounded; the file comes whole or not at all. See `logratio.cache.parquet`.

        Raises:
            NoReferenceError: No such reference, or several.
            DamagedFingerprintError: The folder's fingerprint was altered.
            CorruptCacheError: A file is damaged, or two records contradict each other.
            OSError: The disk is full, or the place cannot be written.
        """
        return parquet.export(self.reference(name), Path(path), advance)

    def open(
        self, name: str | bytes | None = None, *, sums: bool = False, pread: bool = False
    ) -> ReferenceLogps:
        """Open one reference to read log-probs, or sums, by key.

        Args:
            name: Its name, or how it begins, or the 32 bytes of its fingerprint's digest. Without
                it there must be one only.
            sums: Open the folder that keeps sums.
            pread: Read without memory maps, for network file systems.

        Raises:
            NoReferenceError: None fits, or several do.
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
        raise NoReferenceError(
            f"{self.root}: nothing of reference {digest.hex()}; {_listed(found)}"
        )


def _report(reference: StoredReference, *, every_byte: bool) -> ReferenceReport:
    folder = merging.open_folder(reference)
    told = folder.verify() if every_byte else folder.inspect()
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
        for part in told["parts"]
    ]
    problems = [*filter(None, [reference.problem]), *_misnamed(reference), *told["problems"]]
    return ReferenceReport(
        reference, tuple(files), told["distinct"], tuple(told["leftovers"]), tuple(problems)
    )


def _misnamed(reference: StoredReference) -> list[str]:
    if reference.problem or reference.name == reference.proper_name:
        return []
    return [
        f"training looks for {reference.proper_name}, and this folder is named {reference.name}: "
        "rename it"
    ]


def _listed(references: Sequence[StoredReference]) -> str:
    named = [f"\n  {r.name} ({r.kind}: {r.describe()})" for r in references]
    return f"name one of{''.join(named)}"
