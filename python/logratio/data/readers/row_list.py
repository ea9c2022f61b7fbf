"""Rows given as a list of dicts, as `json.load` or `Dataset.to_list` of `datasets` returns them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from logratio.data.readers.rows import NO_ROW, Row
from logratio.data.records import Refusal, Source


class RowList:
    """A list of rows as one input. The rows are not copied."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<{len(self.rows):,} rows in memory>"

    def __deepcopy__(self, memo: object) -> "RowList":
        """Return the list itself: copies of settings share their data."""
        return self


def is_row_list(given: Any) -> bool:
    """Return whether `given` is a list or tuple of mappings, of which there is at least one."""
    return (
        isinstance(given, list | tuple)
        and bool(given)
        and all(isinstance(row, Mapping) and not is_set(row) for row in given)
    )


def is_set(given: Any) -> bool:
    """Return whether `given` is of the library `datasets`, whose `DatasetDict` is a dict."""
    return type(given).__module__.partition(".")[0] == "datasets"


class ListRows:
    """The rows of a `RowList`; the row numbers in messages start at 1."""

    blank_lines = 0

    def __init__(self, rows: RowList, name: str) -> None:
        self.name, self.kind = name, "list of dicts"
        self._rows, self._first, self._row = rows.rows, 0, 0

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @property
    def position(self) -> int:
        """Rows read so far."""
        return self._row

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each row's number and a copy of the row."""
        self._row = self._first
        if not self._rows:
            source = Source(self.name, 0)
            yield source, Refusal(source, "E106", NO_ROW)
        while self._row < len(self._rows):
            self._row += 1
            source, row = Source(self.name, self._row), dict(self._rows[self._row - 1])
            other = next((key for key in row if not isinstance(key, str)), None)
            if other is None:
                yield source, row
            else:
                yield source, Refusal(source, "E203", f"the key {other!r} is not a string")

    def columns(self) -> None:
        """Return None: each row has its own keys."""
        return None

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Raise TypeError: a list of dicts has no columns."""
        raise TypeError(f"a {self.kind} has rows and no columns")

    def mark(self) -> dict[str, Any]:
        """Return the position after the row that was yielded last."""
        return {"row": self._row}

    def resume_from(self, mark: dict[str, Any]) -> None:
        """Start the next iteration at a mark."""
        self._first = self._row = int(mark["row"])
