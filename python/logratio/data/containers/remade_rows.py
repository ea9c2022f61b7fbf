"""Rows that are made of another container's rows: one of several, several of one."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from logratio.data.containers.rows import Row, Rows
from logratio.data.records import Refusal, Source

Made = Sequence[tuple[Source, Row | Refusal]]
"""What was made of some rows, each with its source."""


class RemadeRows(ABC):
    """Base of the containers that make rows of another one's; see `Rows`.

    Its marks hold one of that container, and how many of the next rows were yielded already.
    """

    def __init__(self, rows: Rows, how: str) -> None:
        self.kind = f"{rows.kind}, {how}"
        self._rows = rows
        self._begin: dict[str, Any] = {}  # a mark of those rows; empty: their first
        self._skip = 0
        self._mark: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The container's name."""
        return self._rows.name

    @property
    def size(self) -> int | None:
        """The container's size."""
        return self._rows.size

    @property
    def position(self) -> int:
        """How much of the container was read."""
        return self._rows.position

    @property
    def blank_lines(self) -> int:
        """Blank lines met so far."""
        return self._rows.blank_lines

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield what is made, in the order of the rows that it is made of."""
        self._mark, skip = None, self._skip
        for before, made, behind in self._remade():
            for done, part in enumerate(made, 1):
                is_last = done == len(made)
                self._mark = _marked(behind, 0) if is_last else _marked(before, done)
                if done > skip:
                    yield part
            skip = 0

    @abstractmethod
    def _remade(self) -> Iterator[tuple[dict[str, Any], Made, dict[str, Any]]]:
        """Yield what is made of the next rows, between the marks before and behind them.

        The first mark is `_begin`. Read again from the mark before, the same is made.
        """

    def columns(self) -> None:
        """Return None: each row has its own keys."""
        return None

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Refuse: there are no columns."""
        raise TypeError(f"{self.kind} has rows and no columns")

    def mark(self) -> dict[str, Any]:
        """Return the place behind the row that was yielded last."""
        return _marked(self._begin, self._skip) if self._mark is None else self._mark

    def go_on(self, mark: dict[str, Any]) -> None:
        """Let the next iteration go on at a mark."""
        self._begin, self._skip, self._mark = dict(mark.get("rows", {})), mark.get("made", 0), None
        self._rows.go_on(self._begin)


def _marked(rows: dict[str, Any], made: int) -> dict[str, Any]:
    return {"rows": rows, "made": made}
