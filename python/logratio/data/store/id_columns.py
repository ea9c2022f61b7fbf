"""Columns of token ids, written to a store without Python rows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logratio.data.formats.row import RowView
from logratio.data.formats.values import values_of_ids
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.data.store.value_columns import ValueColumns
from logratio.data.tokenization.groups import PAIR, Fitting, GroupArrays, TokenizedGroup, no_values

if TYPE_CHECKING:
    import pyarrow


NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")
FORMAT = "token ids"


@dataclass(frozen=True, slots=True)
class Ids:
    """A column of lists: the concatenated values (int64) and the offset of each list (int64)."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, column: "pyarrow.Array") -> "Ids":
        """Return a view of a column of integer lists; a null list is empty.

        Raises:
            InvalidRecordError: E203 for another type, E202 for a null inside a list.
        """
        import pyarrow as pa

        lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        if not lists or not pa.types.is_integer(column.type.value_type):
            raise InvalidRecordError("E203", f"a column of ids holds {column.type}")
        if column.null_count:
            column = column.fill_null([])
        values = column.flatten()
        if values.null_count:
            raise InvalidRecordError("E202", "a token id is null")
        lengths = np.diff(column.offsets.to_numpy())
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        return cls(values.to_numpy().astype(np.int64, copy=False), offsets)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each list."""
        return np.diff(self.offsets)

    def bad(self, vocabulary_size: int) -> NDArray[np.bool_]:
        """Return which lists contain an id outside the vocabulary."""
        wrong = np.flatnonzero((self.values < 0) | (self.values >= vocabulary_size))
        rows = np.searchsorted(self.offsets, wrong, "right") - 1
        return np.bincount(rows, minlength=len(self.offsets) - 1).astype(bool)

    def rows(self, start: int, stop: int) -> "Ids":
        """Return a view of some lists."""
        offsets = self.offsets[start : stop + 1]
        return Ids(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def list(self, row: int) -> list[int]:
        """Return one list."""
        ids: list[int] = self.values[self.offsets[row] : self.offsets[row + 1]].tolist()
        return ids


Part = GroupArrays | TokenizedGroup | Refusal


def parts(
    batch: "pyarrow.RecordBatch", first: Source, file: int, fitting: Fitting
) -> Iterator[Part]:
    """Yield a batch's groups: adjacent valid rows as arrays, and every other row separately.

    Args:
        batch: Columns `prompt_ids`, `chosen_ids` and `rejected_ids`, and possibly values.
        first: The source of its first row.
        file: The number of the container.
        fitting: Rules and vocabulary size.
    """
    try:
        columns = [Ids.of(batch.column(column)) for column in NAMES]
    except InvalidRecordError as error:
        yield from (
            Refusal(Source(first.file, first.line + row), error.code, error.reason)
            for row in range(batch.num_rows)
        )
        return
    numbers = ValueColumns.of(batch.schema)
    odd = _odd(columns, fitting)
    values = no_values(2 * batch.num_rows)
    if numbers.is_simple:
        values, unlike = numbers.read(batch)
        odd |= unlike
    else:
        odd[:] = True
    start = 0
    for row in [*np.flatnonzero(odd).tolist(), batch.num_rows]:
        if start < row:
            pairs = [ids.rows(start, row) for ids in columns]
            yield _arrays(pairs, file, first.line + start, values[2 * start : 2 * row])
        if row < batch.num_rows:
            (others,) = batch.select([*numbers.names]).slice(row, 1).to_pylist()
            ids_of_row = {name: ids.list(row) for name, ids in zip(NAMES, columns, strict=True)}
            yield row_group(others | ids_of_row, Source(first.file, first.line + row), fitting)
        start = row + 1


def _odd(columns: list[Ids], fitting: Fitting) -> NDArray[np.bool_]:
    """Return which rows may violate a rule or need truncation."""
    rules = fitting.rules
    prompt, chosen, rejected = (ids.lengths for ids in columns)
    longest = np.maximum(chosen, rejected)
    odd: NDArray[np.bool_] = (
        (prompt == 0) | (prompt > rules.prompt_budget) | (prompt + longest > rules.max_length)
    )
    odd |= np.minimum(chosen, rejected) == 0
    odd |= _may_be_equal(columns[1], columns[2])
    for ids in columns:
        odd |= ids.bad(fitting.vocabulary_size)
    return odd


def _may_be_equal(chosen: Ids, rejected: Ids) -> NDArray[np.bool_]:
    """Return which rows have answers of equal length with equal first and last ids."""
    found: NDArray[np.bool_] = (chosen.lengths == rejected.lengths) & (chosen.lengths > 0)
    rows = np.flatnonzero(found)
    for place in (0, -1):
        ids = [side.values[side.offsets[rows - place] + place] for side in (chosen, rejected)]
        found[rows] &= ids[0] == ids[1]
    return found


def _arrays(columns: list[Ids], file: int, line: int, values: NDArray[np.float32]) -> GroupArrays:
    """Build groups of valid rows: chosen, then rejected."""
    prompt, chosen, rejected = columns
    count = len(prompt.lengths)
    lengths = np.column_stack((chosen.lengths, rejected.lengths)).ravel()
    ids = np.empty(int(lengths.sum()), np.int32)
    starts = np.cumsum(lengths) - lengths
    for side, own in enumerate((chosen, rejected)):
        shift = np.repeat(starts[side::2] - own.offsets[:-1], own.lengths)
        ids[np.arange(len(own.values)) + shift] = own.values
    return GroupArrays(
        prompt.values.astype(np.int32),
        prompt.lengths.astype(np.uint32),
        ids,
        np.ones(len(ids), np.uint8),
        lengths.astype(np.uint32),
        np.full(count, 2, np.uint32),
        np.tile(PAIR, count),
        np.full(count, file, np.uint32),
        np.arange(line, line + count, dtype=np.uint64),
        values,
    )


def row_group(row: dict[str, Any], source: Source, fitting: Fitting) -> TokenizedGroup | Refusal:
    """Read token ids and values from a row.

    Returns:
        The group, or the row's refusal: E203, E212, and those of `Fitting.group`.
    """
    for name in NAMES:
        ids = row.get(name)
        if not isinstance(ids, list) or not all(type(value) is int for value in ids):
            return Refusal(source, "E203", f"{name!r} is not a list of token ids")
    try:
        numbers = values_of_ids(RowView(row, {}))
    except InvalidRecordError as error:
        return Refusal(source, error.code, error.reason)
    group = fitting.group(
        row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], source, numbers.completions
    )
    if isinstance(group, Refusal):
        return group
    return replace(group, notes=[*group.notes, *numbers.warnings])
