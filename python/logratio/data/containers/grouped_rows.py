"""Rows that stand next to each other and say the same under a key, as one row."""

from collections.abc import Iterator
from typing import Any

from logratio.data.containers.remade_rows import Made, RemadeRows
from logratio.data.containers.rows import Row, Rows
from logratio.data.records import Refusal, Source

MOST = 1024
"""Most rows that become one, and most refusals that wait for such rows to end."""


class GroupedRows(RemadeRows):
    """Rows of a container, those with equal values under a key as one row; see `Rows`.

    Only neighbours are compared, so that a file of any size is read in little memory. The row has
    the key with its value, and under every other key a list of what its rows have, null where one
    has nothing. Its source is that of its first row. Rows that are refused in between follow it,
    and do not end it.
    """

    def __init__(self, rows: Rows, key: str) -> None:
        super().__init__(rows, f"rows of one {key!r} together")
        self._key = key

    def _remade(self) -> Iterator[tuple[dict[str, Any], Made, dict[str, Any]]]:
        start = before = self._begin
        group = _Group(self._key)
        for source, row in self._rows:
            if not group.takes(source, row):
                yield start, group.made(), before
                start, group = before, _Group(self._key)
                group.takes(source, row)
            before = self._rows.mark()
        yield start, group.made(), self._rows.mark()


class _Group:
    """Neighbours with one value, and what was refused among them."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._rows: list[Row] = []
        self._first: Source | None = None
        self._value: Any = None
        self._count = 0
        self._refused: list[tuple[Source, Refusal]] = []
        self._ahead = 0  # of them stand before the first row

    def takes(self, source: Source, row: Row | Refusal) -> bool:
        """Take a row if it belongs here; an empty group takes any."""
        if not isinstance(row, Refusal) and row.get(self._key) is None:
            is_there = self._key in row
            reason = f"{self._key!r} is null" if is_there else f"the key {self._key!r} is missing"
            reason += ", and rows are to be put together by it"
            row = Refusal(source, "E202" if is_there else "E201", reason)
        if isinstance(row, Refusal):
            if len(self._refused) >= MOST:
                return False
            self._refused.append((source, row))
            return True
        if self._first is None:
            self._first, self._value = source, row[self._key]
            self._ahead = len(self._refused)
        elif row[self._key] != self._value:
            return False
        self._count += 1
        if self._count <= MOST:
            self._rows.append(row)
        return True

    def made(self) -> Made:
        """Return one row of all, or why there is none, and what was refused."""
        if self._first is None:
            return self._refused
        row = self._together(self._first)
        return [*self._refused[: self._ahead], (self._first, row), *self._refused[self._ahead :]]

    def _together(self, first: Source) -> Row | Refusal:
        if self._count > MOST:
            reason = f"{self._count:,} rows have the same {self._key!r} (most: {MOST:,})"
            return Refusal(first, "E212", reason)
        names = dict.fromkeys(name for row in self._rows for name in row)
        return {
            name: self._value if name == self._key else [row.get(name) for row in self._rows]
            for name in names
        }
