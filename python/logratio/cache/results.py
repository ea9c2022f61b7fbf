"""What is in a cache, and what was done to it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logratio.cache.identity import StoredReference
from logratio.forecast import size

WRITER = re.compile(r"(?P<host>.+)-(?P<process>\d+)-[0-9a-f]+\.journal")
MANIFEST = ".manifest.json"


@dataclass(frozen=True)
class CacheFile:
    """One file of log-probs.

    Attributes:
        name: a shard's, a journal's, or the manifest's of a shard that is not what was written.
        is_sealed: whether it is a shard, which never changes; a journal otherwise.
        is_in_use: whether a writer holds it. Some network file systems do not show the writers
            of other hosts.
        completions, tokens, bytes: what it holds and how long it is; 0 where it is damaged.
        torn_bytes: behind a journal's last whole block; nobody was told that they are written.
        problem: what is wrong with it, or None.
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
        told = WRITER.fullmatch(self.name)
        return f"host {told['host']}, process {told['process']}" if told else None

    @property
    def remedy(self) -> str:
        """What to do about its problem."""
        problem = self.problem or ""
        if "belongs to reference" in problem or " values, not " in problem:
            return f"move {self.name} to the folder where it belongs"
        if "version" in problem:
            return "read it with the logratio that wrote it, or a newer one"
        stem = self.name.removesuffix(MANIFEST)
        names = f"{stem}.arrow and {stem}{MANIFEST}" if stem != self.name else self.name
        return (
            f"remove {names} and run `logratio precompute` again: its completions are scored "
            "again, nothing else is lost"
        )


@dataclass(frozen=True)
class ReferenceReport:
    """What one reference's folder holds, and what is wrong with it.

    Attributes:
        reference: whose it is.
        files: shards, then journals.
        completions: different ones in all whole files; None where that cannot be said.
        leftovers: names of files that mean nothing: what writers that died left behind.
        problems: what concerns no single file.
    """

    reference: StoredReference
    files: tuple[CacheFile, ...]
    completions: int | None
    leftovers: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.damaged

    @property
    def damaged(self) -> tuple[CacheFile, ...]:
        """The files that are not what was written, or are not to be read here."""
        return tuple(file for file in self.files if file.problem is not None)

    @property
    def tokens(self) -> int:
        """Tokens of all records, those that repeat a completion included."""
        return sum(file.tokens for file in self.files)

    @property
    def bytes(self) -> int:
        """Length of all whole files of log-probs."""
        return sum(file.bytes for file in self.files)

    @property
    def torn_bytes(self) -> int:
        """Bytes behind the last whole blocks of journals."""
        return sum(file.torn_bytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
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
            lines.append(f"  torn       {self.torn_bytes:,} bytes that no writer acknowledged")
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
        """Say in lines what is wrong, and what to do about it."""
        files = [
            line
            for file in self.damaged
            for line in (f"problem: {file.problem}", f"  what to do: {file.remedy}")
        ]
        return [*files, *(line for problem in self.problems for line in _with_advice(problem))]


def _with_advice(problem: str) -> list[str]:
    line = f"problem: {problem}"
    if "contradicts the record" in problem:
        return [line, "  what to do: remove the one of the two files that is not to be trusted"]
    if problem.startswith("corrupt reference cache"):
        return [line, "  what to do: `logratio cache verify` names each damaged file"]
    return [line]


@dataclass(frozen=True)
class Change:
    """What merging or compacting did to one reference's folder.

    Attributes:
        reference: whose it is.
        completions: completions in the shards that were written now.
        repeats: records left out because another of the same completion was taken.
        shards: names of the shards written now.
        removed: names of the files that went, because their records are in the new shards or
            because they belonged to nothing.
        in_use: journals left alone: their writer lives, or may live on another host.
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
        parts = [f"{completions} written to {shards}" if self.shards else "nothing to write"]
        parts += [f"{self.repeats:,} repeated ones left out"] * bool(self.repeats)
        parts += [f"{count(len(self.removed), 'file')} removed"] * bool(self.removed)
        if self.in_use:
            names = ", ".join(self.in_use)
            parts.append(f"left alone, for a writer may be at work: {names}")
        return f"{self.reference.path}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Exported:
    """A Parquet file that was written.

    Attributes:
        path: where it is.
        reference: whose log-probs it has.
        rows: completions in it.
        tokens: their tokens.
        bytes: its length.
    """

    path: Path
    reference: StoredReference
    rows: int
    tokens: int
    bytes: int


def count(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
