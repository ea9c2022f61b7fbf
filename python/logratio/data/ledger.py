"""The account of a reading: what became of each row, where it came from, and when to stop."""

from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import StoreWriter
from logratio.data.arrays import CONFLICT, DUPLICATE, GroupArrays
from logratio.data.containers import Row
from logratio.data.formats import INSPECT, KNOWN_SHAPES
from logratio.data.groups import TokenizedGroup
from logratio.data.records import Refusal, Source
from logratio.data.report import LISTED, BadDataError, DataReport, write_refusal

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
