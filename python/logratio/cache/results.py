"""Reports on the content of a cache, and results of operations on it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logratio.cache.identity import StoredReference
from logratio.forecast import count, size

WRITER = re.compile(r"(?P<host>.+)-(?P<process>\d+)-[0-9a-f]+\.journal")
MANIFEST = ".manifest.json"


@dataclass(frozen=True)
class CacheFile:
    """One file of log-probs.

    Attributes:
        name: Name of a shard, of a journal, or of the manifest of a damaged shard.
        is_sealed: Whether it is a shard, which never changes; otherwise a journal.
        is_in_use: Whether a writer has it open. Some network file systems do not show writers on
            other hosts.
        completions, tokens, bytes: Its contents and size; 0 if it is damaged.
        torn_bytes: Bytes after a journal's last complete block, from a write that did not finish.
        problem: What is wrong with the file, or None.
    """

    name: str
    is_sealed: bool
    is_in_use: bool
    completions: int
    tokens: int
    bytes: int
    torn_bytes: int
    problem: str | None

    @property
    def writer(self) -> str | None:
        """Host and process that wrote a journal; None for a shard."""
        match = WRITER.fullmatch(self.name)
        return f"host {match['host']}, process {match['process']}" if match else None

    @property
    def remedy(self) -> str:
        """How to repair the problem."""
        problem = self.problem or ""
        if "belongs to reference" in problem or " values, not " in problem:
            return f"move {self.name} to the folder of its reference"
        if "version" in problem:
            return "read it with the logratio version that wrote it, or a newer one"
        stem = self.name.removesuffix(MANIFEST)
        names = f"{stem}.arrow and {stem}{MANIFEST}" if stem != self.name else self.name
        return (
            f"remove {names} and run `logratio precompute` again: this recomputes its completions; "
            "nothing else is lost"
        )


@dataclass(frozen=True)
class ReferenceReport:
    """The contents of one reference's folder, and its problems.

    Attributes:
        reference: The reference.
        files: The shards, then the journals.
        completions: Number of distinct completions in the undamaged files; None if unknown.
        leftovers: Names of unused files left by writers that were killed.
        problems: Problems that do not concern a single file.
    """

    reference: StoredReference
    files: tuple[CacheFile, ...]
    completions: int | None
    leftovers: tuple[str, ...]
    problems: tuple[str, ...]

    def __repr__(self) -> str:
        state = "sound" if self.is_whole else "not sound"
        path = str(self.reference.path)
        return f"ReferenceReport({path!r}, {state}, {self._holdings()}, {self._files()})"

    @property
    def is_whole(self) -> bool:
        """Whether there are no problems."""
        return not self.problems and not self.damaged

    @property
    def damaged(self) -> tuple[CacheFile, ...]:
        """The files with a problem: damaged, or in the wrong folder."""
        return tuple(file for file in self.files if file.problem is not None)

    @property
    def tokens(self) -> int:
        """Tokens of all records, including repeated ones of the same completion."""
        return sum(file.tokens for file in self.files)

    @property
    def bytes(self) -> int:
        """Size of all undamaged files of log-probs."""
        return sum(file.bytes for file in self.files)

    @property
    def torn_bytes(self) -> int:
        """Bytes after the last complete blocks of journals."""
        return sum(file.torn_bytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that can be written as JSON."""
        reference = self.reference
        totals = {"tokens": self.tokens, "bytes": self.bytes, "torn_bytes": self.torn_bytes}
        return {
            "folder": str(reference.path),
            "kind": reference.kind,
            "fingerprint": reference.digest.hex(),
            "model": reference.describe(),
            "hard": dict(reference.hard),
            "soft": [dict(fields) for fields in reference.soft],
            "whole": self.is_whole,
            "completions": self.completions,
            **totals,
            "files": [asdict(file) | {"writer": file.writer} for file in self.files],
            "leftovers": list(self.leftovers),
            "problems": list(self.problems),
        }

    def to_text(self) -> str:
        """Return a paragraph for the terminal."""
        return "\n".join([f"{self.reference.path} ({self.reference.kind})", *self._lines()])

    def _lines(self) -> list[str]:
        soft = [", ".join(f"{k} {v}" for k, v in fields.items()) for fields in self.reference.soft]
        lines = [f"  model      {self.reference.describe()}"]
        lines += [f"  made with  {conditions}" for conditions in soft if conditions]
        lines += [f"  holds      {self._holdings()}", f"  files      {self._files()}"]
        lines += [f"  in use     {f.name}: {f.writer}" for f in self.files if f.is_in_use]
        if self.torn_bytes:
            lines.append(f"  torn       {self.torn_bytes:,} bytes of unfinished writes")
        if self.leftovers:
            names = ", ".join(self.leftovers)
            lines.append(f"  leftovers  {names} (`logratio cache compact` removes them)")
        return lines + [f"  {line}" for line in self.complaints()]

    def _holdings(self) -> str:
        completions = "? completions"
        if self.completions is not None:
            completions = count(self.completions, "completion")
        return f"{completions}, {count(self.tokens, 'token')}, {size(self.bytes)}"

    def _files(self) -> str:
        shards = sum(file.is_sealed for file in self.files)
        return f"{count(shards, 'shard')}, {count(len(self.files) - shards, 'journal')}"

    def complaints(self) -> list[str]:
        """Return lines that describe each problem and its remedy."""
        files = [
            line
            for file in self.damaged
            for line in (f"problem: {file.problem}", f"  what to do: {file.remedy}")
        ]
        return [*files, *(line for problem in self.problems for line in _with_advice(problem))]


def _with_advice(problem: str) -> list[str]:
    line = f"problem: {problem}"
    if "contradicts the record" in problem:
        return [line, "  what to do: remove the one of the two files that you do not trust"]
    if problem.startswith("corrupt reference cache"):
        return [line, "  what to do: `logratio cache verify` names each damaged file"]
    return [line]


@dataclass(frozen=True)
class Change:
    """The result of merging into or compacting one reference's folder.

    Attributes:
        reference: The reference.
        completions: Completions in the newly written shards.
        repeats: Records left out because they repeat a completion.
        shards: Names of the newly written shards.
        removed: Names of the removed files: their records are in the new shards, or they were
            leftovers.
        in_use: Journals left alone because their writer is running, or may be on another host.
    """

    reference: StoredReference
    completions: int
    repeats: int
    shards: tuple[str, ...]
    removed: tuple[str, ...]
    in_use: tuple[str, ...]

    def to_text(self) -> str:
        """Return a line for the terminal."""
        completions, shards = (
            count(self.completions, "completion"),
            count(len(self.shards), "shard"),
        )
        parts = [f"{completions} written to {shards}" if self.shards else "nothing new"]
        parts += [f"{count(self.repeats, 'repeated record')} left out"] * bool(self.repeats)
        parts += [f"{count(len(self.removed), 'file')} removed"] * bool(self.removed)
        if self.in_use:
            names = ", ".join(self.in_use)
            parts.append(f"left alone because a writer may be using them: {names}")
        return f"{self.reference.path}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Exported:
    """The result of an export to Parquet.

    Attributes:
        path: The file.
        reference: The exported reference.
        rows: Number of completions.
        tokens: Number of their tokens.
        bytes: Size of the file.
    """

    path: Path
    reference: StoredReference
    rows: int
    tokens: int
    bytes: int
