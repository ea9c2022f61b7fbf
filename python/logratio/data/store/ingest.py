"""Rows on their way into a store: read as records, encoded in batches, each accounted for."""

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
from logratio.data.tokenization.groups import PAIR, GroupArrays, TokenizedGroup
from logratio.data.tokenization.tokenizer import NO_TEMPLATE, PreferenceTokenizer

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("prompt", "chosen", "rejected")
FORMAT = "trl"
"""What the formats' catalogue calls such a row."""

_BRACKETS = np.frombuffer(b"[{", np.uint8)
_SPACES = np.frombuffer(b" \t\r\n", np.uint8)

_ALNUM = np.array([chr(byte).isalnum() and byte < 128 for byte in range(256)])
_VISIBLE = np.array([ord("!") <= byte <= ord("~") for byte in range(256)])

TextColumn = list[str] | tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Strings, or a string array's UTF-8 bytes and where each text begins."""


def holds_texts(row: Row) -> bool:
    """Say whether a row's prompt and answers are strings."""
    return all(type(row.get(name)) is str for name in COLUMNS)


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Rows whose prompt and answers are strings, from anywhere."""

    rows: Sequence[tuple[Source, Row]]

    def columns(self) -> list[TextColumn]:
        """Return the texts, a column for each of `COLUMNS`."""
        return [[row[name] for _, row in self.rows] for name in COLUMNS]

    def places(
        self, file_number: Callable[[Source], int]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """Return each row's file and line."""
        files = [file_number(source) for source, _ in self.rows]
        lines = [source.line for source, _ in self.rows]
        return np.array(files, np.uint32), np.array(lines, np.uint64)

    def source(self, number: int) -> Source:
        """Return the place of one row."""
        return self.rows[number][0]

    def row(self, number: int) -> tuple[Source, Row | Refusal]:
        """Return one row."""
        return self.rows[number]

    def extra_keys(self, numbers: range) -> Counter[str]:
        """Count the keys of some rows that are not read."""
        rows = (self.rows[number][1] for number in numbers)
        return Counter(key for row in rows if len(row) > 3 for key in row if key not in COLUMNS)


@dataclass(frozen=True, slots=True)
class PlainTable:
    """A stretch of a table with strings under `COLUMNS`; its first row stands at `first`."""

    batch: "pyarrow.RecordBatch"
    first: Source

    def columns(self) -> list[TextColumn] | None:
        """View the texts, a null as an empty one; None where a column holds no strings."""
        import pyarrow as pa

        columns = [self.batch.column(name) for name in COLUMNS]
        if not all(pa.types.is_string(c.type) or pa.types.is_large_string(c.type) for c in columns):
            return None
        return [_view(column.fill_null("") if column.null_count else column) for column in columns]

    def places(
        self, file_number: Callable[[Source], int]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """Return each row's file and line."""
        count, line = self.batch.num_rows, self.first.line
        files = np.full(count, file_number(self.first), np.uint32)
        return files, np.arange(line, line + count, dtype=np.uint64)

    def row(self, number: int) -> tuple[Source, Row | Refusal]:
        """Make one row of it."""
        source = self.source(number)
        (row,) = rows_of(self.batch.slice(number, 1))
        if isinstance(row, UnicodeDecodeError):
            return source, Refusal(source, "E103", f"a text is not UTF-8 ({row.reason})")
        return source, row

    def extra_keys(self, numbers: range) -> Counter[str]:
        """Count the columns that are not read, once for each of some rows."""
        extra = set(self.batch.schema.names) - set(COLUMNS)
        return Counter(dict.fromkeys(extra, len(numbers)))

    def slices(self, rows: int, *, is_text: bool) -> Iterator[tuple["PlainTable", bool]]:
        """Cut it into tables of at most so many rows, and say whether they may spell chats.

        Args:
            rows: Most rows of a table.
            is_text: No text spells a chat, however it begins.
        """
        columns = None if is_text else self.columns()
        odd = np.zeros(self.batch.num_rows, np.bool_)
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
        """Leave out its first rows."""
        return PlainTable(self.batch.slice(rows), self.source(rows))

    def source(self, number: int) -> Source:
        """Return the place of one row."""
        return Source(self.first.file, self.first.line + number)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring rows, all of them encoded or none.

    Attributes:
        rows: Their numbers.
        groups: As groups; None if they are odd.
        moved: For each group, how many of its completions change the end of the prompt: W502.
    """

    rows: range
    groups: GroupArrays | None
    moved: NDArray[np.uint32]


def stretches(
    pairs: EncodedPairs, files: NDArray[np.uint32], lines: NDArray[np.uint64]
) -> Iterator[Stretch]:
    """Part rows into odd ones and encoded ones, in order.

    Args:
        pairs: The rows as ids.
        files: Number of each row's file.
        lines: Line of each row.
    """
    odd = pairs.odd
    borders = [0, *(np.flatnonzero(odd[1:] != odd[:-1]) + 1).tolist(), len(odd)]
    first = 0
    for start, stop in pairwise(borders):
        if start == stop:
            continue
        if odd[start]:
            yield Stretch(range(start, stop), None, pairs.moved[:0])
            continue
        last = first + stop - start
        groups = _groups(pairs, first, last, files[start:stop], lines[start:stop])
        yield Stretch(range(start, stop), groups, pairs.moved[first:last])
        first = last


def _groups(
    pairs: EncodedPairs,
    first: int,
    last: int,
    files: NDArray[np.uint32],
    lines: NDArray[np.uint64],
) -> GroupArrays:
    """View the pairs `first` to `last` as groups."""
    prompts = _stretch(pairs.prompt_lengths, first, last)
    completions = _stretch(pairs.completion_lengths, 2 * first, 2 * last)
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
    )


def _stretch(lengths: NDArray[np.uint32], first: int, last: int) -> slice:
    start = int(lengths[:first].sum())
    return slice(start, start + int(lengths[first:last].sum()))


def opens_brackets(column: TextColumn) -> NDArray[np.bool_]:
    """Say which texts begin with a bracket or a brace, as lists and objects do; see `opens`."""
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
    """Say whether a word of an answer follows its prompt without white space.

    Letters other than ASCII do not count: some scripts have no spaces.
    """
    end, start = prompt[-1:], answer[:1]
    return "!" <= end <= "~" and start.isascii() and start.isalnum()


def touching(prompts: TextColumn, answers: TextColumn) -> NDArray[np.bool_]:
    """Say of each row what `touch` says."""
    if isinstance(prompts, list) or isinstance(answers, list):
        pairs = zip(prompts, answers, strict=True)
        return np.array([touch(str(prompt), str(answer)) for prompt, answer in pairs], np.bool_)
    (data, ends), (more, starts) = prompts, answers
    rows = np.flatnonzero((np.diff(ends) > 0) & (np.diff(starts) > 0))
    found = np.zeros(len(ends) - 1, np.bool_)
    found[rows] = _VISIBLE[data[ends[1:][rows] - 1]] & _ALNUM[more[starts[:-1][rows]]]
    return found


def _view(column: "pyarrow.Array") -> TextColumn:
    """View the bytes of a string array, and where each text begins."""
    import pyarrow as pa

    _, offsets, data = column.buffers()
    width = np.int64 if pa.types.is_large_string(column.type) else np.int32
    every = np.frombuffer(offsets, width) if offsets else np.zeros(1, width)
    own = every[column.offset : column.offset + len(column) + 1].astype(np.int64)
    return np.frombuffer(data or b"", np.uint8), own


BATCH_ROWS = 1024
BATCH_CHARACTERS = 1 << 21
"""Records are encoded once so many, or so much text, have come together."""

SourcedRow = dict[str, Any]
Part = PreferenceRecord | TokenizedGroup | Refusal
"""Something that a row held."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A row that waits for its batch: decoded, or a pair of plain text as it stands."""

    source: Source
    row: SourcedRow
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

    def take(self, source: Source, row: SourcedRow | Refusal) -> bool:
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

    def _may_spell(self, row: SourcedRow) -> bool:
        """Say whether a text may spell a chat, which the decoder has to look at."""
        if self.decoder.settings.strings == "text":
            return False
        return any(opens(row[name]) for name in COLUMNS)

    def _decoded(self, source: Source, row: SourcedRow | Refusal) -> "_Waiting | None":
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
        if self.tokenizer.bypasses_template:
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

    def write(
        self, rows: Sequence[tuple[Sequence[TokenizedGroup | Refusal], SourcedRow | None]]
    ) -> None:
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
