"""Rows on their way into a store: read as records, encoded in batches, each one accounted for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import StoreWriter
from logratio.data.arrays import GroupArrays
from logratio.data.codes import CODES, Omitted
from logratio.data.columns import FORMAT as IDS_FORMAT
from logratio.data.columns import NAMES, parts, row_group
from logratio.data.formats import Decoder
from logratio.data.formats.cells import opens
from logratio.data.groups import TokenizedGroup
from logratio.data.ledger import Ledger, Written
from logratio.data.plain import (
    COLUMNS,
    FORMAT,
    PlainRows,
    PlainTable,
    holds_texts,
    stretches,
    touch,
    touching,
)
from logratio.data.records import InvalidRecordError, PreferenceRecord, Refusal, Source
from logratio.data.report import DataReport
from logratio.data.tokenization import NO_TEMPLATE, PreferenceTokenizer

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024
BATCH_CHARACTERS = 1 << 21
"""Records are encoded once so many, or so much text, have come together."""

Row = dict[str, Any]
Part = PreferenceRecord | TokenizedGroup | Refusal
"""Something that a row held."""


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
        ledger: Accounts for every row.
    """

    tokenizer: PreferenceTokenizer
    writer: StoreWriter
    decoder: Decoder
    ledger: Ledger
    _waiting: "list[_Waiting]" = field(default_factory=list)
    _parts: int = 0
    _characters: int = 0

    @property
    def report(self) -> DataReport:
        """What became of the rows so far."""
        return self.ledger.report

    def take(self, source: Source, row: Row | Refusal) -> bool:
        """Take one row; say whether a batch went through with it."""
        self.report.read += source.line > 0  # else it is no row, but something about the file
        if isinstance(row, Refusal):
            self.ledger.refuse(row)
            return False
        if self._takes_texts(source.file, row) and holds_texts(row) and not self._may_spell(row):
            return self._wait(_Waiting(source, row), sum(len(row[name]) for name in COLUMNS))
        waiting = self._decoded(source, row)
        return waiting is not None and self._wait(waiting, waiting.characters())

    def _takes_texts(self, file: str, names: Iterable[str]) -> bool:
        return (
            self.tokenizer.takes_pairs
            and not self.ledger.is_lost
            and self.decoder.holds_pairs_of_text(file, names)
        )

    def _may_spell(self, row: Row) -> bool:
        """Say whether a text may spell a chat, which the decoder has to look at."""
        if self.decoder.settings.strings == "text":
            return False
        return any(opens(row[name]) for name in COLUMNS)

    def _decoded(self, source: Source, row: Row | Refusal) -> "_Waiting | None":
        """Read a row; None where it is refused."""
        if isinstance(row, Refusal):
            self.ledger.refuse(row)
            return None
        if NAMES[0] in row:
            self.report.formats[IDS_FORMAT] += 1
            return _Waiting(source, row, [row_group(row, source, self.tokenizer.fitting)])
        try:
            decoded = self.decoder.decode(row, source)
        except InvalidRecordError as error:
            if error.format:
                self.report.formats[error.format] += 1
            self.ledger.refuse(Refusal(source, error.code, error.reason), row)
            return None
        self.report.formats[decoded.format] += 1
        self.report.extra_keys.update(decoded.extra_keys)
        for code in decoded.left_out:
            self.report.warn("W530", source, f" {CODES[code]}")
        for code in decoded.warnings:
            detail = f": {code.what}" if isinstance(code, Omitted) else ""
            self.report.warn(str(code), source, detail)
        is_chat = decoded.records[0].is_chat or self.tokenizer.wraps_text
        if is_chat and self.tokenizer.chat_template is None:
            self.ledger.refuse(Refusal(source, "E401", NO_TEMPLATE))
        self._count_kind(source, 1, is_chat=is_chat)
        if not is_chat:
            self.report.touching_rows += _touches(decoded.records[0])
        return _Waiting(source, row, decoded.records)

    def _count_kind(self, first: Source, rows: int, *, is_chat: bool) -> None:
        """Count rows that are written by the chat template, or read as they stand."""
        if is_chat:
            self.report.chat_rows += rows
            return
        self.report.text_rows += rows
        if self.tokenizer.passes_template_by:
            self.report.warn("W518", first, rows=rows)

    def reads_texts(self, columns: Iterable[str]) -> bool:
        """Say whether `take_texts` can take a table."""
        return self.tokenizer.takes_pairs and set(COLUMNS) <= set(columns)

    def take_texts(self, batch: "pyarrow.RecordBatch", first: int, name: str) -> None:
        """Take the rows of a table that has `COLUMNS`; `first` is the number of its first one."""
        whole = PlainTable(batch, Source(name, first))
        is_settled = self.decoder.settings.strings == "text"
        for table, may_spell in whole.slices(BATCH_ROWS, is_text=is_settled):
            rest = self._take_singly(table, every=may_spell)
            self.flush()
            self.report.read += rest.batch.num_rows
            self._take_plain(rest)

    def _take_singly(self, table: PlainTable, *, every: bool) -> PlainTable:
        """Take rows one by one, every one or until the rest can be taken in bulk; return it."""
        names, is_text = table.batch.schema.names, table.columns() is not None
        number = 0
        while number < table.batch.num_rows:
            if is_text and not every and self._takes_texts(table.first.file, names):
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
        touches = touching(columns[0], columns[1])
        for stretch in stretches(encoded, *plain.places(self.ledger.file_number)):
            if stretch.groups is None:
                decoded = [self._decoded(*plain.row(number)) for number in stretch.rows]
                self._encode([waiting for waiting in decoded if waiting is not None])
            elif not self.ledger.is_lost:
                self.report.formats[FORMAT] += len(stretch.rows)
                first = plain.source(stretch.rows[0])
                self._count_kind(first, len(stretch.rows), is_chat=False)
                rows = slice(stretch.rows.start, stretch.rows.stop)
                self.report.touching_rows += int(np.count_nonzero(touches[rows]))
                self.report.extra_keys.update(plain.extra_keys(stretch.rows))
                self._write_arrays(stretch.groups, stretch.moved)

    def take_ids(self, batch: "pyarrow.RecordBatch", first: int, name: str) -> None:
        """Take the rows of a table of token ids; `first` is the number of its first one."""
        self.flush()
        self.report.read += batch.num_rows
        self.report.formats[IDS_FORMAT] += batch.num_rows
        for column in set(batch.schema.names) - set(NAMES):
            self.report.extra_keys[column] += batch.num_rows
        file = self.ledger.file_number(Source(name, first))
        for part in parts(batch, Source(name, first), file, self.tokenizer.fitting):
            if isinstance(part, GroupArrays):
                self._write_arrays(part)
            else:
                self.write([([part], None)])

    def _write_arrays(self, arrays: GroupArrays, moved: NDArray[np.uint32] | None = None) -> None:
        self.ledger.account_arrays(arrays, *arrays.push(self.writer), moved)

    def _wait(self, waiting: "_Waiting", characters: int) -> bool:
        """Let the records of a row wait for their batch."""
        if self.ledger.is_lost:
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
        if self.ledger.is_lost:
            groups = []
        outcomes, first = GroupArrays.of(groups, self.ledger.file_number).push(self.writer)
        written = map(Written, groups, outcomes.tolist(), first.tolist())
        for own, row in rows:
            results = [next(written, None) if isinstance(p, TokenizedGroup) else p for p in own]
            if found := [result for result in results if result is not None]:
                self.ledger.account(found, row)

    def close(self) -> None:
        """Take what is waiting and check the account; see `Ledger.close`."""
        self.flush()
        self.ledger.close()


def _touches(record: PreferenceRecord) -> bool:
    first = record.completions[0]
    return touch(str(record.prompt), str(first.context or first.answer))
