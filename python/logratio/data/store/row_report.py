"""Count every row: kept, refused (with the reason), or removed as a duplicate."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import VALUES, StoreWriter
from logratio.data.formats.catalogue import INSPECT, KNOWN_SHAPES
from logratio.data.readers.rows import Row
from logratio.data.records import CODES, NO_VALUES, Cut, Omitted, Refusal, Source, stops
from logratio.data.store.value_counts import (
    ValueCounts,
    added,
    from_dict,
    to_dict,
    to_lines,
    value_counts,
)
from logratio.data.tokenization.groups import CONFLICT, DUPLICATE, GroupArrays, TokenizedGroup
from logratio.errors import LogratioError
from logratio.forecast import count
from logratio.setting_names import worded

LISTED = 20
"""Most places that are listed per cause; all are counted."""

_SHOWN = 3  # most places per cause in the printed report
_LONGEST_ROW = 1 << 20  # most JSON characters of a refused row that is written to the log


class BadDataError(LogratioError, ValueError):
    """More rows are broken than allowed, or no row is left.

    Attributes:
        errors: Up to twenty lines ``file:line:column [CODE] reason``.
    """

    def __init__(self, summary: str, errors: tuple[str, ...] = ()) -> None:
        super().__init__(summary, errors)
        self.summary = summary
        self.errors = errors

    def __str__(self) -> str:
        return worded("\n".join((self.summary, *self.errors)))


@dataclass(slots=True)
class DataReport:
    """The counts of all rows of a dataset: ``read = kept + refused + deduplicated``.

    Attributes:
        read: Rows read, without blank lines.
        kept: Rows that became groups.
        deduplicated: Rows with the same tokens as an earlier row.
        refused_by_code: Number of refused rows per code.
        warnings_by_code: Number of warnings per code (see `logratio.data.records.CODES`).
        blank_lines: Lines without a row.
        formats: Number of rows per known format, kept or not.
        text_rows: Rows of plain text, read unchanged.
        chat_rows: Rows rendered by the chat template.
        touching_rows: Rows of plain text whose answer follows the prompt without white space.
        extra_keys: Number of rows per unread key.
        prompt_tokens: Tokens of the prompts of kept rows, each prompt once.
        completion_tokens: Tokens of all completions of kept rows.
        left_out: Files of folders that are not data: README, LICENSE, hidden files.
        places: The first places per code, and for "duplicate".
        cuts: Per truncation code, how often 2^(k-1) to 2^k - 1 tokens were lost, by k.
        date: The date in the chat template.
        values: How many completions of kept rows have a score, rank, margin or weight, with the
            sum, the least and the largest.
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
    values: ValueCounts = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"DataReport({count(self.read, 'row')} read: {self.kept:,} kept, "
            f"{self.refused:,} refused, {count(self.deduplicated, 'duplicate')})"
        )

    @property
    def refused(self) -> int:
        """Number of refused rows."""
        return self.refused_by_code.total()

    @property
    def broken(self) -> int:
        """Number of rows refused for their structure (E codes)."""
        return sum(count for code, count in self.refused_by_code.items() if stops(code))

    def refuse(self, refusal: Refusal) -> None:
        """Count a refused row."""
        self.refused_by_code[refusal.code] += 1
        column = "" if refusal.column is None else f":{refusal.column}"
        self._list(refusal.code, f"{refusal.source}{column} {refusal.reason}")

    def warn(self, code: str, source: Source, detail: str = "", *, rows: int = 1) -> None:
        """Count a warning about a kept row, or about `rows` rows of which `source` is the first."""
        self.warnings_by_code[code] += rows
        self._list(code, f"{source}{detail}")

    def drop_duplicate(self, source: Source, first: Source) -> None:
        """Count a row that repeats an earlier one."""
        self.deduplicated += 1
        self._list("duplicate", f"{source} repeats {first}")

    def keep(self, groups: Sequence[TokenizedGroup]) -> None:
        """Count a kept row, the tokens of its groups and their warnings."""
        completions = [completion for group in groups for completion in group.completions]
        prompts = sum(len(group.prompt_ids) for group in groups)
        self.keep_many(1, prompts, sum(len(completion.ids) for completion in completions))
        if any(completion.values != NO_VALUES for completion in completions):
            own = np.array([completion.values for completion in completions], np.float32)
            self.values = added(self.values, value_counts(own))
        for group in groups:
            for code in group.notes:
                detail = f": {code.what}" if isinstance(code, Omitted) else ""
                self.warn(str(code), group.source, detail)
                if isinstance(code, Cut):
                    self.cuts.setdefault(str(code), Counter())[code.tokens.bit_length()] += 1

    def keep_many(self, rows: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count kept rows that have no warnings."""
        self.kept += rows
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def withdraw(self, refusal: Refusal) -> None:
        """Count a row as refused that was counted as kept."""
        self.kept -= 1
        self.refuse(refusal)

    def cut_bins(self, code: str) -> list[tuple[str, int]]:
        """Return bins of lost tokens, "1", "2-3", "4-7" …, with the number of cuts in each."""
        counts = self.cuts.get(code)
        if not counts:
            return []
        names = {k: f"{1 << k - 1:,}-{(1 << k) - 1:,}" for k in range(2, max(counts) + 1)}
        names[1] = "1"
        return [(names[k], counts[k]) for k in range(min(counts), max(counts) + 1)]

    def check(self) -> None:
        """Check that no row was lost.

        Raises:
            RuntimeError: The counts do not add up, which is a bug in this library.
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
            "values": to_dict(self.values),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataReport":
        """Restore a report from the result of `to_dict`, for example from a store's metadata."""
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
        report.values = from_dict(values.get("values", {}))
        report.places.update(values.get("places", {}))
        for code, counts in values.get("cuts", {}).items():
            report.cuts[code] = Counter({int(k): count for k, count in counts.items()})
        return report

    def to_text(self) -> str:
        """Return the report as printed text."""
        lines = [self._counts()]
        if self.broken:
            share = math.ceil(self.broken / self.read * 1000) / 1000 if self.read else 1
            lines.append(
                f"broken (E codes): {count(self.broken, 'row')}; training stops, unless "
                f"--max-bad-fraction {share:g} leaves them out"
            )
        if self.kept:
            tokens = f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion"
            lines.append(f"{tokens} tokens")
        lines += to_lines(self.values)
        lines += [f"{count(rows, 'row')} of {name}" for name, rows in self.formats.items()]
        if self.date:
            lines.append(f"the chat template writes the date: {self.date} (--date)")
        if self.blank_lines:
            lines.append(count(self.blank_lines, "blank line"))
        if self.extra_keys:
            lines.append(f"keys that were not read: {', '.join(sorted(self.extra_keys))}")
        if self.left_out:
            lines.append(f"files that are not data and were not read: {', '.join(self.left_out)}")
        for counts in (self.refused_by_code, self.warnings_by_code):
            for code, number in sorted(counts.items()):
                lines.append(f"[{code}] {number:,} × {CODES[code]}")
                lines += self._shown(code, number)
        if self.deduplicated:
            lines.append(count(self.deduplicated, "duplicate"))
            lines += self._shown("duplicate", self.deduplicated)
        return "\n".join(lines)

    def _counts(self) -> str:
        return (
            f"{count(self.read, 'row')} read: {self.kept:,} kept, {self.refused:,} refused, "
            f"{count(self.deduplicated, 'duplicate')} left out"
        )

    def _list(self, code: str, place: str) -> None:
        places = self.places.setdefault(code, [])
        # Both sides of a row may have the same warning.
        if len(places) < LISTED and place not in places:
            places.append(place)

    def _shown(self, code: str, count: int) -> list[str]:
        lines = [f"  {place}" for place in self.places[code][:_SHOWN]]
        listed = len(self.places[code])  # lists each row once, even with several warnings
        more = (listed if listed < LISTED else count) - len(lines)
        return lines + ([f"  … and {more:,} more"] if more else [])


def write_refusal(file: IO[str], refusal: Refusal, row: object = None) -> None:
    """Append a refused row to a JSON lines file.

    Args:
        file: Open for text.
        refusal: File, line, column, code and reason.
        row: The row, if it could be read; left out above `_LONGEST_ROW` characters.
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
            entry["row"] = json.loads(text, parse_constant=str)  # NaN is not JSON
    file.write(json.dumps(entry) + "\n")


_ALWAYS_STOPS = {"E105", "E106", "E108", "E109", "E111", "E112", "E113", "E401"}
"""Codes that always stop: all rows are affected, or an unknown number."""
_KEY_CODES = {"E201", "E203"}  # codes of rows whose format is known, or almost


@dataclass(frozen=True, slots=True)
class Written:
    """A group, its outcome, and the earlier group that it repeats or contradicts (-1: none)."""

    group: TokenizedGroup
    outcome: int
    first: int


@dataclass(slots=True)
class Ledger:
    """Counts rows as they are read, and stops at too many broken ones.

    Attributes:
        writer: The store, which records the source of each group.
        max_bad_fraction: Largest accepted fraction of broken rows.
        log: The list of refused rows, if any.
        files: The number of each container, by its name.
        report: The counts so far.
    """

    writer: StoreWriter
    max_bad_fraction: float = 0.0
    log: IO[str] | None = None
    files: dict[str, int] = field(default_factory=dict)
    report: DataReport = field(default_factory=DataReport)
    _errors: list[str] = field(default_factory=list)

    @property
    def will_fail(self) -> bool:
        """Whether the run will fail; it only continues to collect further errors."""
        return bool(self._errors) and not self.max_bad_fraction

    def file_number(self, source: Source) -> int:
        """Return the number of a container, assigned by its name."""
        return self.files.setdefault(source.file, len(self.files))

    def place(self, group: int) -> Source:
        """Return the source of a written group."""
        file, line = self.writer.place(group)
        return Source([*self.files][file], line)

    def place_of(self, arrays: GroupArrays, group: int) -> Source:
        """Return the source of a group in `arrays`."""
        return Source([*self.files][arrays.files[group]], int(arrays.lines[group]))

    def account_arrays(
        self,
        arrays: GroupArrays,
        outcomes: NDArray[np.uint8],
        first: NDArray[np.int64],
        moved: NDArray[np.uint32] | None,
    ) -> None:
        """Count rows with one pair each.

        Args:
            arrays: The pairs.
            outcomes: uint8 `[G]`, the outcome of each.
            first: int64 `[G]`, the earlier group that each repeats or contradicts, or -1.
            moved: uint32 `[G]`, completions of each with a moved boundary (W502).
        """
        kept = outcomes != DUPLICATE
        tokens = np.add.reduceat(arrays.completion_lengths, np.arange(0, 2 * len(arrays), 2))
        prompts = int(arrays.prompt_lengths[kept].sum())
        self.report.keep_many(int(kept.sum()), prompts, int(tokens[kept].sum()))
        values = arrays.values.reshape(len(arrays), -1)[kept].reshape(-1, len(VALUES))
        self.report.values = added(self.report.values, value_counts(values))
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
        """Count a row as kept if one of its groups is; its other parts then become warnings."""
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
                reason = other.reason if isinstance(other, Refusal) else "a duplicate pair"
                self.report.warn("W530", _source(other), f" {reason}")

    def _lose(self, part: Written | Refusal, row: Row | None) -> None:
        if isinstance(part, Refusal):
            self.refuse(part, row)
        else:
            self.report.drop_duplicate(part.group.source, self.place(part.first))

    def refuse(self, refusal: Refusal, row: object = None) -> None:
        """Count and log a refused row.

        Raises:
            BadDataError: Too many rows are broken to continue.
        """
        self.report.refuse(refusal)
        if self.log:
            write_refusal(self.log, refusal, row)
        if not refusal.stops:
            return
        if len(self._errors) < LISTED:
            self._errors.append(str(refusal))
        is_full = not self.max_bad_fraction and len(self._errors) == LISTED
        is_of_file = not refusal.source.line
        if is_full or refusal.code in _ALWAYS_STOPS or is_of_file:
            raise self._broken()

    def close(self) -> None:
        """Check the counts.

        Raises:
            BadDataError: Too many rows are broken, or none is left.
            RuntimeError: The counts do not add up, which is a bug in this library.
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
            summary += "; --max-bad-fraction counts such rows and leaves them out"
        if "E206" in report.refused_by_code:
            summary += f"\n{KNOWN_SHAPES}"
        elif not _KEY_CODES.isdisjoint(report.refused_by_code):
            summary += f"\n{INSPECT}"
        return BadDataError(summary, tuple(self._errors))


def _source(part: Written | Refusal) -> Source:
    return part.source if isinstance(part, Refusal) else part.group.source
