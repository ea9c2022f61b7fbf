"""Pairs of plain text, many at once: no Python object for what a row holds once it is encoded.

Rust encodes the rows at which there is nothing to tell. The odd ones, a fraction of most data, go
the long way through the decoder and the tokenizer, which say what is the matter.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from logratio._rust import EncodedPairs
from logratio.data.arrays import PAIR, GroupArrays
from logratio.data.containers import Row
from logratio.data.containers.table_rows import rows_of
from logratio.data.formats.cells import opens
from logratio.data.records import Refusal, Source

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
