"""What became of every row: kept, refused or left out as a duplicate, and why."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import StoreWriter
from logratio.data.formats.catalogue import INSPECT, KNOWN_SHAPES
from logratio.data.readers.rows import Row
from logratio.data.records import CODES, Cut, Omitted, Refusal, Source, stops
from logratio.data.tokenization.groups import CONFLICT, DUPLICATE, GroupArrays, TokenizedGroup
from logratio.errors import LogratioError

LISTED = 20
"""Most places that are named for one cause; every one is counted."""

_SHOWN = 3  # of them in the text
_LONGEST_ROW = 1 << 20  # characters of JSON up to which a refused row is written down


class BadDataError(LogratioError, ValueError):
    """The data is broken beyond what was allowed, or nothing of it is left.

    Attributes:
        errors: Up to twenty lines ``file:line:column [CODE] reason``.
    """

    def __init__(self, summary: str, errors: tuple[str, ...] = ()) -> None:
        super().__init__(summary, errors)
        self.summary = summary
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join((self.summary, *self.errors))


@dataclass(slots=True)
class DataReport:
    """The account of a data set: ``read = kept + refused + deduplicated``.

    Attributes:
        read: Rows met, blank lines aside.
        kept: Rows that became groups.
        deduplicated: Rows that say what a kept row said before.
        refused_by_code: Rows refused for each cause.
        warnings_by_code: How often each warning was given (see `logratio.data.codes`).
        blank_lines: Lines without a row.
        formats: Rows of each shape, kept or not; rows of no known shape are in none.
        text_rows: Rows of plain text, read as it stands.
        chat_rows: Rows that the chat template wrote.
        touching_rows: Rows of plain text whose answer begins with a word right after the prompt.
        extra_keys: Rows in which each key that was not read stands.
        prompt_tokens: Of kept rows, each prompt once.
        completion_tokens: Of kept rows, all completions.
        left_out: Files of folders that are no data: README, LICENSE, hidden ones.
        places: For each code, and for "duplicate", the first places.
        cuts: For each code of a cut, how often 2^(k-1) to 2^k - 1 tokens were lost, by k.
        date: What the chat template writes as the date.
    """

    read: int = 0
    kept: int = 0
    deduplicated: int = 0
    refused_by_code: Counter[str] = field(default_factory=Counter)
    warnings_by_code: Counter[str] = field(default_factory=Counter)
    blank_lines: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    extra_keys: Counter[str] = field(default_factory=Counter)
    text_rows: int = 0
    chat_rows: int = 0
    touching_rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    left_out: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    cuts: dict[str, Counter[int]] = field(default_factory=dict)
    date: str | None = None

    def __repr__(self) -> str:
        return (
            f"DataReport({self.read:,} rows read: {self.kept:,} kept, {self.refused:,} refused, "
            f"{self.deduplicated:,} duplicates)"
        )

    @property
    def refused(self) -> int:
        """Rows that were not taken."""
        return self.refused_by_code.total()

    @property
    def broken(self) -> int:
        """Rows refused for their structure (E…)."""
        return sum(count for code, count in self.refused_by_code.items() if stops(code))

    def refuse(self, refusal: Refusal) -> None:
        """Count a refused row."""
        self.refused_by_code[refusal.code] += 1
        column = "" if refusal.column is None else f":{refusal.column}"
        self._list(refusal.code, f"{refusal.source}{column} {refusal.reason}")

    def warn(self, code: str, source: Source, detail: str = "", *, rows: int = 1) -> None:
        """Count a warning about a row that is kept, or about so many from it on."""
        self.warnings_by_code[code] += rows
        self._list(code, f"{source}{detail}")

    def drop_duplicate(self, source: Source, first: Source) -> None:
        """Count a row that repeats a kept one."""
        self.deduplicated += 1
        self._list("duplicate", f"{source} repeats {first}")

    def keep(self, groups: Sequence[TokenizedGroup]) -> None:
        """Count a kept row, the tokens of its groups and their warnings."""
        completions = [completion for group in groups for completion in group.completions]
        prompts = sum(len(group.prompt_ids) for group in groups)
        self.keep_many(1, prompts, sum(len(completion.ids) for completion in completions))
        for group in groups:
            for code in group.notes:
                detail = f": {code.what}" if isinstance(code, Omitted) else ""
                self.warn(str(code), group.source, detail)
                if isinstance(code, Cut):
                    self.cuts.setdefault(str(code), Counter())[code.tokens.bit_length()] += 1

    def keep_many(self, rows: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count kept rows of which there is nothing to tell."""
        self.kept += rows
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def withdraw(self, refusal: Refusal) -> None:
        """Count a row as refused that was kept so far."""
        self.kept -= 1
        self.refuse(refusal)

    def cut_bins(self, code: str) -> list[tuple[str, int]]:
        """Name the bins of a code's cuts, "1", "2-3", "4-7" …, and count the cuts in each."""
        counts = self.cuts.get(code)
        if not counts:
            return []
        names = {k: f"{1 << k - 1:,}-{(1 << k) - 1:,}" for k in range(2, max(counts) + 1)}
        names[1] = "1"
        return [(names[k], counts[k]) for k in range(min(counts), max(counts) + 1)]

    def check(self) -> None:
        """Make sure that no row was lost.

        Raises:
            RuntimeError: The counts do not add up: a fault of this library.
        """
        if self.read != self.kept + self.refused + self.deduplicated:
            raise RuntimeError(f"rows were lost: {self._counts()}")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "read": self.read,
            "kept": self.kept,
            "refused": self.refused,
            "deduplicated": self.deduplicated,
            "refused_by_code": dict(sorted(self.refused_by_code.items())),
            "warnings_by_code": dict(sorted(self.warnings_by_code.items())),
            "blank_lines": self.blank_lines,
            "formats": dict(self.formats),
            "text_rows": self.text_rows,
            "chat_rows": self.chat_rows,
            "touching_rows": self.touching_rows,
            "extra_keys": dict(self.extra_keys),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "left_out": self.left_out,
            "places": self.places,
            "cuts": {
                code: {str(k): count for k, count in sorted(counts.items())}
                for code, counts in self.cuts.items()
            },
            "date": self.date,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataReport":
        """Read what `to_dict` returned, for example from a store's metadata."""
        report = cls()
        numbers = (
            "read",
            "kept",
            "deduplicated",
            "blank_lines",
            "text_rows",
            "chat_rows",
            "touching_rows",
        )
        for name in (*numbers, "prompt_tokens", "completion_tokens"):
            setattr(report, name, values.get(name, 0))
        for name in ("refused_by_code", "warnings_by_code", "formats", "extra_keys"):
            getattr(report, name).update(values.get(name, {}))
        report.left_out = list(values.get("left_out", ()))
        report.date = values.get("date")
        report.places.update(values.get("places", {}))
        for code, counts in values.get("cuts", {}).items():
            report.cuts[code] = Counter({int(k): count for k, count in counts.items()})
        return report

    def to_text(self) -> str:
        """Tell it to a person."""
        lines = [self._counts()]
        if self.broken:
            share = math.ceil(self.broken / self.read * 1000) / 1000 if self.read else 1
            lines.append(
                f"{self.broken:,} rows are broken (E…): training stops, or goes on without them "
                f"with --max-bad-fraction {share:g}"
            )
        if self.kept:
            tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion"
            lines.append(f"{tokens} tokens")
        lines += [f"{count:,} rows of {name}" for name, count in self.formats.items()]
        if self.date:
            lines.append(f"the chat template writes the date: {self.date} (--date)")
        if self.blank_lines:
            lines.append(f"{self.blank_lines:,} blank lines")
        if self.extra_keys:
            lines.append(f"keys that were not read: {', '.join(sorted(self.extra_keys))}")
        if self.left_out:
            lines.append(f"files beside the data that were not read: {', '.join(self.left_out)}")
        for counts in (self.refused_by_code, self.warnings_by_code):
            for code, count in sorted(counts.items()):
                lines.append(f"[{code}] {count:,} × {CODES[code]}")
                lines += self._shown(code, count)
        if self.deduplicated:
            lines.append(f"{self.deduplicated:,} duplicates")
            lines += self._shown("duplicate", self.deduplicated)
        return "\n".join(lines)

    def _counts(self) -> str:
        return (
            f"{self.read:,} rows read: {self.kept:,} kept, {self.refused:,} refused, "
            f"{self.deduplicated:,} duplicates left out"
        )

    def _list(self, code: str, place: str) -> None:
        places = self.places.setdefault(code, [])
        if len(places) < LISTED and place not in places:  # both sides of a row may be concerned
            places.append(place)

    def _shown(self, code: str, count: int) -> list[str]:
        lines = [f"  {place}" for place in self.places[code][:_SHOWN]]
        listed = len(self.places[code])  # which names a row once, whatever it has of one kind
        more = (listed if listed < LISTED else count) - len(lines)
        return lines + ([f"  … and {more:,} more"] if more else [])


def write_refusal(file: IO[str], refusal: Refusal, row: object = None) -> None:
    """Append a refused row to a JSON lines file.

    Args:
        file: Open for text.
        refusal: File, line, column, code and reason.
        row: The row as it was read, where it could be read; left out above a million characters.
    """
    entry: dict[str, Any] = {
        "file": refusal.source.file,
        "line": refusal.source.line,
        "column": refusal.column,
        "code": refusal.code,
        "reason": refusal.reason,
    }
    if row is not None:
        text = json.dumps(row, default=str)
        if len(text) <= _LONGEST_ROW:
            entry["row"] = json.loads(text, parse_constant=str)  # NaN is no JSON
    file.write(json.dumps(entry) + "\n")


_ALWAYS_STOPS = {"E105", "E106", "E108", "E109", "E111", "E112", "E113", "E401"}
"""No fraction of the rows is bad: all are, or nobody knows how many."""
_KEY_CODES = {"E201", "E203"}  # of rows whose format is known, or nearly


@dataclass(frozen=True, slots=True)
class Written:
    """A group that was offered to the store: what became of it, and who said it before."""

    group: TokenizedGroup
    outcome: int
    first: int


@dataclass(slots=True)
class Ledger:
    """Accounts for rows that were read.

    Attributes:
        writer: Knows where its groups came from.
        max_bad_fraction: Largest share of broken rows to go on with.
        log: Where refused rows are listed, if anywhere.
        files: The number of each container by its name.
        report: What became of the rows so far.
    """

    writer: StoreWriter
    max_bad_fraction: float = 0.0
    log: IO[str] | None = None
    files: dict[str, int] = field(default_factory=dict)
    report: DataReport = field(default_factory=DataReport)
    _errors: list[str] = field(default_factory=list)

    @property
    def is_lost(self) -> bool:
        """Whether the run will fail: it goes on to find further faults, and no more."""
        return bool(self._errors) and not self.max_bad_fraction

    def file_number(self, source: Source) -> int:
        """Number a container by its name."""
        return self.files.setdefault(source.file, len(self.files))

    def place(self, group: int) -> Source:
        """Tell where a written group came from."""
        file, line = self.writer.place(group)
        return Source([*self.files][file], line)

    def place_of(self, arrays: GroupArrays, group: int) -> Source:
        """Tell where a group that is being written comes from."""
        return Source([*self.files][arrays.files[group]], int(arrays.lines[group]))

    def account_arrays(
        self,
        arrays: GroupArrays,
        outcomes: NDArray[np.uint8],
        first: NDArray[np.int64],
        moved: NDArray[np.uint32] | None,
    ) -> None:
        """Count rows of one group each, and look only at those that came before.

        Args:
            arrays: The groups, pairs all of them.
            outcomes: What became of each.
            first: The group that said each, or its opposite, before.
            moved: How many completions of each change the end of the prompt: W502.
        """
        kept = outcomes != DUPLICATE
        tokens = np.add.reduceat(arrays.completion_lengths, np.arange(0, 2 * len(arrays), 2))
        prompts = int(arrays.prompt_lengths[kept].sum())
        self.report.keep_many(int(kept.sum()), prompts, int(tokens[kept].sum()))
        if moved is not None:
            self._warn_of_moved(arrays, np.where(kept, moved, 0))
        for group in np.flatnonzero(first >= 0).tolist():
            source, other = self.place_of(arrays, group), self.place(int(first[group]))
            if outcomes[group] == CONFLICT:
                self.report.warn("W507", source, f" against {other}")
            else:
                self.report.drop_duplicate(source, other)

    def _warn_of_moved(self, arrays: GroupArrays, moved: NDArray[Any]) -> None:
        for group in np.repeat(np.arange(len(arrays)), moved).tolist():
            self.report.warn("W502", self.place_of(arrays, group))

    def account(self, own: list[Written | Refusal], row: Row | None) -> None:
        """Count a row as kept if a group of it is; what else it holds is then a warning."""
        kept = [part for part in own if isinstance(part, Written) and part.outcome != DUPLICATE]
        if not kept:
            self._lose(own[0], row)
            return
        self.report.keep([part.group for part in kept])
        for part in kept:
            if part.outcome == CONFLICT:
                self.report.warn("W507", part.group.source, f" against {self.place(part.first)}")
        for other in own:
            if other not in kept:
                reason = other.reason if isinstance(other, Refusal) else "a pair that came before"
                self.report.warn("W530", _source(other), f" {reason}")

    def _lose(self, part: Written | Refusal, row: Row | None) -> None:
        if isinstance(part, Refusal):
            self.refuse(part, row)
        else:
            self.report.drop_duplicate(part.group.source, self.place(part.first))

    def refuse(self, refusal: Refusal, row: object = None) -> None:
        """Count and list a refused row.

        Raises:
            BadDataError: No more broken rows are allowed.
        """
        self.report.refuse(refusal)
        if self.log:
            write_refusal(self.log, refusal, row)
        if not refusal.stops:
            return
        if len(self._errors) < LISTED:
            self._errors.append(str(refusal))
        is_lost = not self.max_bad_fraction and len(self._errors) == LISTED
        if is_lost or refusal.code in _ALWAYS_STOPS or not refusal.source.line:  # the file itself
            raise self._broken()

    def close(self) -> None:
        """Check the account.

        Raises:
            BadDataError: Too many rows are broken, or none is left.
            RuntimeError: The account does not add up: a fault of this library.
        """
        if self.report.broken > self.max_bad_fraction * self.report.read:
            raise self._broken()
        self.report.check()
        if not self.report.kept:
            raise BadDataError(f"no row was kept\n{self.report.to_text()}")

    def _broken(self) -> BadDataError:
        report = self.report
        summary = "the data is broken:"
        if report.read:
            summary += f" {report.broken:,} of the {report.read:,} rows read"
        if report.broken < report.read:
            summary += "; --max-bad-fraction goes on without such rows, and counts them"
        if "E206" in report.refused_by_code:
            summary += f"\n{KNOWN_SHAPES}"
        elif not _KEY_CODES.isdisjoint(report.refused_by_code):
            summary += f"\n{INSPECT}"
        return BadDataError(summary, tuple(self._errors))


def _source(part: Written | Refusal) -> Source:
    return part.source if isinstance(part, Refusal) else part.group.source
