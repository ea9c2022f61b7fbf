"""Rows on their way into a store: read as records, encoded in batches, each one accounted for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import StoreWriter
from logratio.data.arrays import CONFLICT, DUPLICATE, GroupArrays
from logratio.data.codes import CODES
from logratio.data.columns import FORMAT as IDS_FORMAT
from logratio.data.columns import NAMES, parts, row_group
from logratio.data.formats import KNOWN_SHAPES, Decoder
from logratio.data.groups import TokenizedGroup
from logratio.data.plain import COLUMNS, FORMAT, PlainRows, PlainTable, holds_texts, stretches
from logratio.data.records import InvalidRecordError, PreferenceRecord, Refusal, Source
from logratio.data.report import LISTED, BadDataError, DataReport, write_refusal
from logratio.data.tokenization import NO_TEMPLATE, PreferenceTokenizer

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024
BATCH_CHARACTERS = 1 << 21
"""Records are encoded once so many, or so much text, have come together."""

_ALWAYS_STOPS = {"E105", "E106", "E108", "E109", "E111", "E112", "E113", "E401"}
"""No fraction of the rows is bad: all are, or nobody knows how many."""
_SHAPE_CODES = {"E201", "E203", "E206"}  # mended by knowing which shapes are read

Row = dict[str, Any]
Part = PreferenceRecord | TokenizedGroup | Refusal
"""Something that a row held."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A group that was offered to the store: what became of it, and who said it before."""

    group: TokenizedGroup
    outcome: int
    first: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row that waits for its batch: decoded, or a pair of plain text as it stands."""

    source: Source
    row: Row
    parts: Sequence[Part] | None = None

    def characters(self) -> int:
        records = (part for part in self.parts or () if isinstance(part, PreferenceRecord))
        return sum(len(text) for record in records for text in record.texts())


@dataclass(slots=True)
class Intake:
    """Takes rows, one container after another, and writes groups.

    Attributes:
        tokenizer: Text to ids.
        writer: Where groups go.
        decoder: Rows to records.
        max_bad_fraction: Largest share of broken rows to go on with.
        log: Where refused rows are listed, if anywhere.
        files: The number of each container by its name.
        report: What became of the rows so far.
    """

    tokenizer: PreferenceTokenizer
    writer: StoreWriter
    decoder: Decoder
    max_bad_fraction: float = 0.0
    log: IO[str] | None = None
    files: dict[str, int] = field(default_factory=dict)
    report: DataReport = field(default_factory=DataReport)
    _errors: list[str] = field(default_factory=list)
    _waiting: "list[_Waiting]" = field(default_factory=list)
    _parts: int = 0
    _characters: int = 0

    def take(self, source: Source, row: Row | Refusal) -> bool:
        """Take one row; say whether a batch went through with it."""
        self.report.read += source.line > 0  # else it is no row, but something about the file
        if isinstance(row, Refusal):
            self.refuse(row)
            return False
        if self._takes_texts(source.file, row) and holds_texts(row):
            return self._wait(_Waiting(source, row), sum(len(row[name]) for name in COLUMNS))
        waiting = self._decoded(source, row)
        return waiting is not None and self._wait(waiting, waiting.characters())

    def _takes_texts(self, file: str, names: Iterable[str]) -> bool:
        return (
            self.tokenizer.takes_pairs
            and not self._is_lost
            and self.decoder.holds_pairs_of_text(file, names)
        )

    @property
    def _is_lost(self) -> bool:
        """Whether the run will fail: it goes on to find further faults, and no more."""
        return bool(self._errors) and not self.max_bad_fraction

    def _decoded(self, source: Source, row: Row | Refusal) -> "_Waiting | None":
        """Read a row; None where it is refused."""
        if isinstance(row, Refusal):
            self.refuse(row)
            return None
        if NAMES[0] in row:
            self.report.formats[IDS_FORMAT] += 1
            return _Waiting(source, row, [row_group(row, source, self.tokenizer.fitting)])
        try:
            decoded = self.decoder.decode(row, source)
        except InvalidRecordError as error:
            self.refuse(Refusal(source, error.code, error.reason), row)
            return None
        self.report.formats[decoded.format] += 1
        self.report.extra_keys.update(decoded.extra_keys)
        for code in decoded.left_out:
            self.report.warn("W530", source, f" {CODES[code]}")
        if decoded.records[0].is_chat and self.tokenizer.chat_template is None:
            self.refuse(Refusal(source, "E401", NO_TEMPLATE))
        return _Waiting(source, row, decoded.records)

    def reads_texts(self, columns: Iterable[str]) -> bool:
        """Say whether `take_texts` can take a table."""
        return self.tokenizer.takes_pairs and set(COLUMNS) <= set(columns)

    def take_texts(self, batch: "pyarrow.RecordBatch", first: int, name: str) -> None:
        """Take the rows of a table that has `COLUMNS`; `first` is the number of its first one."""
        whole = PlainTable(batch, Source(name, first))
        for table in whole.slices(BATCH_ROWS):
            rest = self._take_singly(table)
            self.flush()
            self.report.read += rest.batch.num_rows
            self._take_plain(rest)

    def _take_singly(self, table: PlainTable) -> PlainTable:
        """Take rows one by one until the rest can be taken in bulk; return the rest."""
        names, is_text = table.batch.schema.names, table.columns() is not None
        number = 0
        while number < table.batch.num_rows:
            if is_text and self._takes_texts(table.first.file, names):
                break
            self.take(*table.row(number))
            number += 1
        return table.behind(number)

    def _take_plain(self, plain: PlainRows | PlainTable) -> None:
        """Encode and write pairs of text; look at the odd ones closely."""
        columns = plain.columns()
        if not columns:
            return
        encoded = self.tokenizer.encode_pairs(columns)
        for stretch in stretches(encoded, *plain.places(self.file_number)):
            if stretch.groups is None:
                decoded = [self._decoded(*plain.row(number)) for number in stretch.rows]
                self._encode([waiting for waiting in decoded if waiting is not None])
            elif not self._is_lost:
                self.report.formats[FORMAT] += len(stretch.rows)
                self.report.extra_keys.update(plain.extra_keys(stretch.rows))
                self._write_arrays(stretch.groups, stretch.moved)

    def take_ids(self, batch: "pyarrow.RecordBatch", first: int, name: str) -> None:
        """Take the rows of a table of token ids; `first` is the number of its first one."""
        self.flush()
        self.report.read += batch.num_rows
        self.report.formats[IDS_FORMAT] += batch.num_rows
        for column in set(batch.schema.names) - set(NAMES):
            self.report.extra_keys[column] += batch.num_rows
        file = self.file_number(Source(name, first))
        for part in parts(batch, Source(name, first), file, self.tokenizer.fitting):
            if isinstance(part, GroupArrays):
                self._write_arrays(part)
            else:
                self.write([([part], None)])

    def _write_arrays(self, arrays: GroupArrays, moved: NDArray[np.uint32] | None = None) -> None:
        """Write groups of one row each, and look only at those that came before."""
        outcomes, first = arrays.push(self.writer)
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

    def place_of(self, arrays: GroupArrays, group: int) -> Source:
        """Tell where a group that is being written comes from."""
        return Source([*self.files][arrays.files[group]], int(arrays.lines[group]))

    def _warn_of_moved(self, arrays: GroupArrays, moved: NDArray[Any]) -> None:
        for group in np.repeat(np.arange(len(arrays)), moved).tolist():
            self.report.warn("W502", self.place_of(arrays, group))

    def _wait(self, waiting: "_Waiting", characters: int) -> bool:
        """Let the records of a row wait for their batch."""
        if self._is_lost:
            return False
        self._waiting.append(waiting)
        self._parts += len(waiting.parts or (1,))
        self._characters += characters
        is_full = self._parts >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS
        if is_full:
            self.flush()
        return is_full

    def flush(self) -> None:
        """Encode and write what is waiting."""
        waiting, self._waiting, self._parts, self._characters = self._waiting, [], 0, 0
        for is_plain, rows in groupby(waiting, lambda row: row.parts is None):
            if is_plain:
                self._take_plain(PlainRows([(row.source, row.row) for row in rows]))
            else:
                self._encode([*rows])

    def _encode(self, rows: "Sequence[_Waiting]") -> None:
        """Encode and write rows that were decoded."""
        own = [part for row in rows for part in row.parts or ()]
        records = [part for part in own if isinstance(part, PreferenceRecord)]
        encoded = iter(self.tokenizer.encode_records(records))
        results = (next(encoded) if isinstance(p, PreferenceRecord) else p for p in own)
        self.write([([*islice(results, len(row.parts or ()))], row.row) for row in rows])

    def write(self, rows: Sequence[tuple[Sequence[TokenizedGroup | Refusal], Row | None]]) -> None:
        """Write the groups of rows, and account for each row: its place need not be its own."""
        groups = [part for own, _ in rows for part in own if isinstance(part, TokenizedGroup)]
        if self._is_lost:
            groups = []
        outcomes, first = GroupArrays.of(groups, self.file_number).push(self.writer)
        written = map(_Written, groups, outcomes.tolist(), first.tolist())
        for own, row in rows:
            results = [next(written, None) if isinstance(p, TokenizedGroup) else p for p in own]
            if found := [result for result in results if result is not None]:
                self._account(found, row)

    def file_number(self, source: Source) -> int:
        """Number a container by its name."""
        return self.files.setdefault(source.file, len(self.files))

    def place(self, group: int) -> Source:
        """Tell where a written group came from."""
        file, line = self.writer.place(group)
        return Source([*self.files][file], line)

    def _account(self, own: list[_Written | Refusal], row: Row | None) -> None:
        """Count a row as kept if a group of it is; what else it holds is then a warning."""
        kept = [part for part in own if isinstance(part, _Written) and part.outcome != DUPLICATE]
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

    def _lose(self, part: _Written | Refusal, row: Row | None) -> None:
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
        """Take what is waiting and check the account.

        Raises:
            BadDataError: Too many rows are broken, or none is left.
            RuntimeError: The account does not add up: a fault of this library.
        """
        self.flush()
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
        if not _SHAPE_CODES.isdisjoint(report.refused_by_code):
            summary += f"\n{KNOWN_SHAPES}"
        return BadDataError(summary, tuple(self._errors))


def _source(part: _Written | Refusal) -> Source:
    return part.source if isinstance(part, Refusal) else part.group.source
