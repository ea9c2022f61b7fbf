"""What became of every row: kept, refused or left out as a duplicate, and why."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from logratio.data.codes import CODES, Cut, Omitted, stops
from logratio.data.groups import TokenizedGroup
from logratio.data.records import Refusal, Source
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
