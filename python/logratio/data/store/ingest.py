"""Ingest rows into a store: decode, tokenize in batches, write, and count every row."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import EncodedPairs, StoreWriter
from logratio.data.formats.decoder import Decoder
from logratio.data.formats.row import opens
from logratio.data.readers.rows import Row
from logratio.data.readers.tables import rows_of
from logratio.data.records import (
    CODES,
    InvalidRecordError,
    Omitted,
    PreferenceRecord,
    Refusal,
    Source,
)
from logratio.data.store.id_columns import FORMAT as IDS_FORMAT
from logratio.data.store.id_columns import NAMES, parts, row_group
from logratio.data.store.row_report import DataReport, Ledger, Written
from logratio.data.store.turn_weights import TurnWeights
from logratio.data.store.value_columns import ValueColumns
from logratio.data.tokenization.groups import PAIR, GroupArrays, TokenizedGroup, no_values
from logratio.data.tokenization.tokenizer import NO_TEMPLATE, PreferenceTokenizer

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("prompt", "chosen", "rejected")
FORMAT = "trl"
"""The format of plain text pairs in the catalogue."""

_BRACKETS = np.frombuffer(b"[{", np.uint8)
_SPACES = np.frombuffer(b" \t\r\n", np.uint8)

_ALNUM = np.array([chr(byte).isalnum() and byte < 128 for byte in range(256)])
_VISIBLE = np.array([ord("!") <= byte <= ord("~") for byte in range(256)])

TextColumn = list[str] | tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Strings, or the UTF-8 bytes and the offsets of a string array."""


def holds_texts(row: Row) -> bool:
    """Return whether a row's prompt and answers are strings."""
    return all(type(row.get(name)) is str for name in COLUMNS)


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows whose prompt and answers are strings."""

    rows: Sequence[tuple[Source, Row]]

    def columns(self) -> list[TextColumn]:
        """Return the texts, one column for each of `COLUMNS`."""
        return [[row[name] for _, row in self.rows] for name in COLUMNS]

    def places(
        self, file_number: Callable[[Source], int]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """Return the file number and the line of each row."""
        files = [file_number(source) for source, _ in self.rows]
        lines = [source.line for source, _ in self.rows]
        return np.array(files, np.uint32), np.array(lines, np.uint64)

    def source(self, number: int) -> Source:
        """Return the file and line of one row."""
        return self.rows[number][0]

    def row(self, number: int) -> tuple[Source, Row | Refusal]:
        """Return one row."""
        return self.rows[number]

    def extra_keys(self, numbers: range) -> Counter[str]:
        """Count the unread keys of some rows."""
        rows = (self.rows[number][1] for number in numbers)
        return Counter(key for row in rows if len(row) > 3 for key in row if key not in COLUMNS)

    def values(self) -> NDArray[np.float32]:
        """Return float32 `[2R, 4]`: rows with values are decoded one by one instead."""
        return no_values(2 * len(self.rows))


@dataclass(frozen=True, slots=True)
class PlainTable:
    """A slice of a table with strings under `COLUMNS`; `first` is the source of its first row."""

    batch: "pyarrow.RecordBatch"
    first: Source

    def columns(self) -> list[TextColumn] | None:
        """Return views of the texts, with "" for null; None if a column is not of strings."""
        import pyarrow as pa

        columns = [self.batch.column(name) for name in COLUMNS]
        if not all(pa.types.is_string(c.type) or pa.types.is_large_string(c.type) for c in columns):
            return None
        return [_view(column.fill_null("") if column.null_count else column) for column in columns]

    def places(
        self, file_number: Callable[[Source], int]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """Return the file number and the line of each row."""
        count, line = self.batch.num_rows, self.first.line
        files = np.full(count, file_number(self.first), np.uint32)
        return files, np.arange(line, line + count, dtype=np.uint64)

    def row(self, number: int) -> tuple[Source, Row | Refusal]:
        """Return one row."""
        source = self.source(number)
        (row,) = rows_of(self.batch.slice(number, 1))
        if isinstance(row, UnicodeDecodeError):
            return source, Refusal(source, "E103", f"a text is not UTF-8 ({row.reason})")
        return source, row

    def extra_keys(self, numbers: range) -> Counter[str]:
        """Count the unread columns, once for each of some rows."""
        extra = {*self.batch.schema.names} - {*COLUMNS} - self.numbers.names
        return Counter(dict.fromkeys(extra, len(numbers)))

    @property
    def numbers(self) -> ValueColumns:
        """The columns of scores, margins and weights."""
        return ValueColumns.of(self.batch.schema)

    def values(self) -> NDArray[np.float32]:
        """Return the values of the chosen and rejected side of each row: float32 `[2R, 4]`."""
        return self.numbers.read(self.batch)[0]

    def slices(self, rows: int, *, is_text: bool) -> Iterator[tuple["PlainTable", bool]]:
        """Split into tables of at most `rows` rows; yield each with whether its rows may be odd.

        A row may be odd if its texts may be chats, or if a value is refused or warned about.

        Args:
            rows: Most rows of a table.
            is_text: Whether every string is text, so that none is a chat.
        """
        columns = None if is_text else self.columns()
        odd = np.full(self.batch.num_rows, not self.numbers.is_simple)
        if self.numbers.is_simple:
            odd |= self.numbers.read(self.batch)[1]
        for column in columns or ():
            odd |= opens_brackets(column)
        ends = np.arange(rows, len(odd), rows)
        changes = np.flatnonzero(odd[1:] != odd[:-1]) + 1
        borders = [0, *np.union1d(ends, changes).tolist(), len(odd)]
        for start, stop in pairwise(borders):
            if start < stop:
                part = PlainTable(self.batch.slice(start, stop - start), self.source(start))
                yield part, bool(odd[start])

    def behind(self, rows: int) -> "PlainTable":
        """Return the table without its first rows."""
        return PlainTable(self.batch.slice(rows), self.source(rows))

    def source(self, number: int) -> Source:
        """Return the file and line of one row."""
        return Source(self.first.file, self.first.line + number)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Adjacent rows that were all encoded, or are all odd.

    Attributes:
        rows: Their numbers.
        groups: The encoded groups. None: the rows are odd.
        moved: For each group, its number of completions with a moved boundary (W502).
    """

    rows: range
    groups: GroupArrays | None
    moved: NDArray[np.uint32]


def chunks(
    pairs: EncodedPairs,
    files: NDArray[np.uint32],
    lines: NDArray[np.uint64],
    values: NDArray[np.float32],
) -> Iterator[Chunk]:
    """Split rows into chunks of odd and of encoded ones, in order.

    Args:
        pairs: The encoded rows.
        files: uint32 `[R]`, the file number of each row.
        lines: uint64 `[R]`, the line of each row.
        values: float32 `[2R, 4]`, the values of both sides of each row.
    """
    odd = pairs.odd
    borders = [0, *(np.flatnonzero(odd[1:] != odd[:-1]) + 1).tolist(), len(odd)]
    first = 0
    for start, stop in pairwise(borders):
        if start == stop:
            continue
        if odd[start]:
            yield Chunk(range(start, stop), None, pairs.moved[:0])
            continue
        last = first + stop - start
        sources, own = (files[start:stop], lines[start:stop]), values[2 * start : 2 * stop]
        groups = _groups(pairs, first, last, *sources, own)
        yield Chunk(range(start, stop), groups, pairs.moved[first:last])
        first = last


def _groups(
    pairs: EncodedPairs,
    first: int,
    last: int,
    files: NDArray[np.uint32],
    lines: NDArray[np.uint64],
    values: NDArray[np.float32],
) -> GroupArrays:
    """Return views of the pairs `first` to `last` as groups."""
    prompts = _token_slice(pairs.prompt_lengths, first, last)
    completions = _token_slice(pairs.completion_lengths, 2 * first, 2 * last)
    ids = pairs.completion_ids[completions]
    return GroupArrays(
        pairs.prompt_ids[prompts],
        pairs.prompt_lengths[first:last],
        ids,
        np.ones(len(ids), np.uint8),
        pairs.completion_lengths[2 * first : 2 * last],
        np.full(last - first, 2, np.uint32),
        np.tile(PAIR, last - first),
        files,
        lines,
        values,
    )


def _token_slice(lengths: NDArray[np.uint32], first: int, last: int) -> slice:
    start = int(lengths[:first].sum())
    return slice(start, start + int(lengths[first:last].sum()))


def opens_brackets(column: TextColumn) -> NDArray[np.bool_]:
    """Return which texts begin with a bracket or a brace, as lists and objects do; see `opens`."""
    if isinstance(column, list):
        return np.array([opens(text) for text in column], np.bool_)
    data, offsets = column
    at, ends = offsets[:-1].copy(), offsets[1:]
    found = np.zeros(len(at), np.bool_)
    rows = np.flatnonzero(at < ends)
    while len(rows):
        first = data[at[rows]]
        found[rows[np.isin(first, _BRACKETS)]] = True
        rows = rows[np.isin(first, _SPACES)]
        at[rows] += 1
        rows = rows[at[rows] < ends[rows]]
    return found


def touch(prompt: str, answer: str) -> bool:
    """Return whether an answer continues the last word of its prompt, without white space.

    Only ASCII letters and digits count, because some scripts have no spaces.
    """
    end, start = prompt[-1:], answer[:1]
    return "!" <= end <= "~" and start.isascii() and start.isalnum()


def touching(prompts: TextColumn, answers: TextColumn) -> NDArray[np.bool_]:
    """Return the result of `touch` for each row."""
    if isinstance(prompts, list) or isinstance(answers, list):
        pairs = zip(prompts, answers, strict=True)
        return np.array([touch(str(prompt), str(answer)) for prompt, answer in pairs], np.bool_)
    (data, ends), (more, starts) = prompts, answers
    rows = np.flatnonzero((np.diff(ends) > 0) & (np.diff(starts) > 0))
    found = np.zeros(len(ends) - 1, np.bool_)
    found[rows] = _VISIBLE[data[ends[1:][rows] - 1]] & _ALNUM[more[starts[:-1][rows]]]
    return found


def _view(column: "pyarrow.Array") -> TextColumn:
    """Return views of the bytes and the offsets of a string array."""
    import pyarrow as pa

    _, offsets, data = column.buffers()
    width = np.int64 if pa.types.is_large_string(column.type) else np.int32
    every = np.frombuffer(offsets, width) if offsets else np.zeros(1, width)
    own = every[column.offset : column.offset + len(column) + 1].astype(np.int64)
    return np.frombuffer(data or b"", np.uint8), own


BATCH_ROWS = 1024
BATCH_CHARACTERS = 1 << 21
"""Records are encoded in batches of at most this many records or characters."""

SourcedRow = dict[str, Any]
Part = PreferenceRecord | TokenizedGroup | Refusal
"""A record, an encoded group, or a refusal from a row."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row in the pending batch: decoded, or an undecoded pair of plain text (`parts` is None)."""

    source: Source
    row: SourcedRow
    parts: Sequence[Part] | None = None

    def characters(self) -> int:
        records = (part for part in self.parts or () if isinstance(part, PreferenceRecord))
        return sum(len(text) for record in records for text in record.texts())


@dataclass(slots=True)
class Intake:
    """Decodes, tokenizes and writes rows, one container after another.

    Attributes:
        tokenizer: The tokenizer.
        writer: Receives the groups.
        decoder: Decodes rows to records.
        ledger: Counts every row.
        turn_weights: Numbers the weights of turns.
    """

    tokenizer: PreferenceTokenizer
    writer: StoreWriter
    decoder: Decoder
    ledger: Ledger
    turn_weights: TurnWeights = field(default_factory=TurnWeights)
    _waiting: "list[_Waiting]" = field(default_factory=list)
    _parts: int = 0
    _characters: int = 0

    @property
    def report(self) -> DataReport:
        """The counts of all rows so far."""
        return self.ledger.report

    def take(self, source: Source, row: SourcedRow | Refusal) -> bool:
        """Add one row; return whether this completed a batch."""
        self.report.read += source.line > 0  # line 0: a refusal of the whole file
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
            and not self.ledger.will_fail
            and self.decoder.holds_pairs_of_text(file, names)
        )

    def _may_spell(self, row: SourcedRow) -> bool:
        """Return whether a text may spell a chat, so that the row needs the decoder."""
        if self.decoder.settings.strings == "text":
            return False
        return any(opens(row[name]) for name in COLUMNS)

    def _decoded(self, source: Source, row: SourcedRow | Refusal) -> "_Waiting | None":
        """Decode a row; None if it is refused."""
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
        """Count rows as rendered by the chat template, or as plain text."""
        if is_chat:
            self.report.chat_rows += rows
            return
        self.report.text_rows += rows
        if self.tokenizer.bypasses_template:
            self.report.warn("W518", first, rows=rows)

    def reads_texts(self, columns: Iterable[str]) -> bool:
        """Return whether `take_texts` can read a table with these columns."""
        return self.tokenizer.takes_pairs and set(COLUMNS) <= set(columns)

    def take_texts(self, batch: "pyarrow.RecordBatch", first: int, name: str) -> None:
        """Add the rows of a table with `COLUMNS`; `first` is the number of its first row."""
        whole = PlainTable(batch, Source(name, first))
        is_settled = self.decoder.settings.strings == "text"
        for table, may_be_odd in whole.slices(BATCH_ROWS, is_text=is_settled):
            rest = self._take_singly(table, every=may_be_odd)
            self.flush()
            self.report.read += rest.batch.num_rows
            self._take_plain(rest)

    def _take_singly(self, table: PlainTable, *, every: bool) -> PlainTable:
        """Add rows one by one, all or until the rest can be read in bulk; return the rest."""
        names = {*table.batch.schema.names} - table.numbers.names
        is_text = table.columns() is not None
        number = 0
        while number < table.batch.num_rows:
            if is_text and not every and self._takes_texts(table.first.file, names):
                break
            self.take(*table.row(number))
            number += 1
        return table.behind(number)

    def _take_plain(self, plain: PlainRows | PlainTable) -> None:
        """Encode and write pairs of text in bulk, and decode the odd ones one by one."""
        columns = plain.columns()
        if not columns:
            return
        encoded = self.tokenizer.encode_pairs(columns)
        touches = touching(columns[0], columns[1])
        places = plain.places(self.ledger.file_number)
        for chunk in chunks(encoded, *places, plain.values()):
            if chunk.groups is None:
                decoded = [self._decoded(*plain.row(number)) for number in chunk.rows]
                self._encode([waiting for waiting in decoded if waiting is not None])
            elif not self.ledger.will_fail:
                self.report.formats[FORMAT] += len(chunk.rows)
                first = plain.source(chunk.rows[0])
                self._count_kind(first, len(chunk.rows), is_chat=False)
                rows = slice(chunk.rows.start, chunk.rows.stop)
                self.report.touching_rows += int(np.count_nonzero(touches[rows]))
                self.report.extra_keys.update(plain.extra_keys(chunk.rows))
                self._write_arrays(chunk.groups, chunk.moved)

    def take_ids(self, batch: "pyarrow.RecordBatch", first: int, name: str) -> None:
        """Add the rows of a table of token ids; `first` is the number of its first row."""
        self.flush()
        self.report.read += batch.num_rows
        self.report.formats[IDS_FORMAT] += batch.num_rows
        for column in {*batch.schema.names} - {*NAMES} - ValueColumns.of(batch.schema).names:
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
        """Add a row to the pending batch; return whether the batch was full and was flushed."""
        if self.ledger.will_fail:
            return False
        self._waiting.append(waiting)
        self._parts += len(waiting.parts or (1,))
        self._characters += characters
        is_full = self._parts >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS
        if is_full:
            self.flush()
        return is_full

    def flush(self) -> None:
        """Encode and write the pending rows."""
        waiting, self._waiting, self._parts, self._characters = self._waiting, [], 0, 0
        for is_plain, rows in groupby(waiting, lambda row: row.parts is None):
            if is_plain:
                self._take_plain(PlainRows([(row.source, row.row) for row in rows]))
            else:
                self._encode([*rows])

    def _encode(self, rows: "Sequence[_Waiting]") -> None:
        """Encode and write decoded rows."""
        own = [part for row in rows for part in row.parts or ()]
        records = [part for part in own if isinstance(part, PreferenceRecord)]
        encoded = iter(self.tokenizer.encode_records(records))
        results = (next(encoded) if isinstance(p, PreferenceRecord) else p for p in own)
        self.write([([*islice(results, len(row.parts or ()))], row.row) for row in rows])

    def write(
        self, rows: Sequence[tuple[Sequence[TokenizedGroup | Refusal], SourcedRow | None]]
    ) -> None:
        """Write the groups of rows and count each row; several rows may share a source."""
        groups = [part for own, _ in rows for part in own if isinstance(part, TokenizedGroup)]
        if self.ledger.will_fail:
            groups = []
        arrays = GroupArrays.of(groups, self.ledger.file_number, self.turn_weights.numbered)
        outcomes, first = arrays.push(self.writer)
        written = map(Written, groups, outcomes.tolist(), first.tolist())
        for own, row in rows:
            results = [next(written, None) if isinstance(p, TokenizedGroup) else p for p in own]
            if found := [result for result in results if result is not None]:
                self.ledger.account(found, row)

    def close(self) -> None:
        """Flush the pending rows and check the counts; see `Ledger.close`."""
        self.flush()
        self.ledger.close()


def _touches(record: PreferenceRecord) -> bool:
    first = record.completions[0]
    return touch(str(record.prompt), str(first.context or first.answer))
