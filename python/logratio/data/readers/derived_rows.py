"""Rows made of other rows: grouped by a key, or passed through a Python function."""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from logratio.data.readers.rows import Row, Rows
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import ConfigError, SettingTypeError

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


_RESULTS = "a row function returns a dict, several in a list, or None to leave the row out"


class RowFunction:
    """A function from a row to a row, to several (a list or a generator), or to none (None).

    It may raise an `InvalidRecordError`, or return some among the rows: what is left out is then
    refused under that error's code.

    Attributes:
        name: Where it is, as ``module:function``; a layout's name.
    """

    def __init__(self, function: Callable[[Row], Any], name: str | None = None) -> None:
        self._function = function
        module = getattr(function, "__module__", "?")
        where = f"{module}:{getattr(function, '__qualname__', type(function).__name__)}"
        self.name = name or where

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowFunction) and self._function == other._function

    def __hash__(self) -> int:
        return hash(self._function)

    def __call__(self, row: Row) -> list[Row | InvalidRecordError]:
        """Return what it makes of a row.

        Raises:
            InvalidRecordError: E217 where it fails or returns something else, R316 where it
                returns nothing; what it raises itself.
        """
        try:
            made = self._function(row)
            rows = list(made) if isinstance(made, list | Iterator) else [made]
        except InvalidRecordError:
            raise
        except Exception as error:
            reason = f"{self} failed: {type(error).__name__}: {error}"
            raise InvalidRecordError("E217", reason) from error
        if made is None or not rows:
            raise InvalidRecordError("R316", f"{self} left the row out")
        if wrong := [one for one in rows if not isinstance(one, Mapping | InvalidRecordError)]:
            got = type(wrong[0]).__name__
            raise InvalidRecordError("E217", f"{self} returned a {got}: {_RESULTS}")
        return [dict(one) if isinstance(one, Mapping) else one for one in rows]


def as_row_function(given: Any) -> RowFunction | None:
    """Return the function that is meant: itself, a layout's by its name, or ``module:function``.

    Modules are also looked for in the working directory, as ``python -m`` does.

    Raises:
        ConfigError: There is no such module, or it holds no such function.
        SettingTypeError: It is neither a function nor a string.
    """
    if given is None or isinstance(given, RowFunction):
        return given
    if callable(given):
        return RowFunction(given)
    if isinstance(given, str):
        from logratio.data.layouts import LAYOUTS

        if layout := LAYOUTS.get(given):
            return RowFunction(layout.function, given)
        return RowFunction(_imported(given))
    raise SettingTypeError(f"a {type(given).__name__} is no function, and no 'module:function'")


def _imported(name: str) -> Callable[[Row], Any]:
    from logratio.data.layouts import LAYOUTS

    module, colon, path = name.partition(":")
    if not (module and colon and path):
        known = ", ".join(LAYOUTS)
        raise ConfigError(f"rows {name!r}: name a function as module:function, or one of {known}")
    found: Any = _module(module, name)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"rows {name!r}: {module} holds no function {path}")
    called: Callable[[Row], Any] = found
    return called


def _module(module: str, name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"rows {name!r}: {module} needs {error.name}, which is missing"
            ) from error
        hint = f" (name the module, {module[:-3]})" if module.endswith(".py") else ""
        raise ConfigError(
            f"rows {name!r}: no module {error.name!r} in the working directory or among what is "
            f"installed{hint}"
        ) from error
    finally:
        sys.path.remove(here)


class MappedRows(RemadeRows):
    """Rows of a container, each as what a function makes of it; see `Rows`.

    A row that the function refuses, or leaves out, comes as a refusal in its place.
    """

    def __init__(self, rows: Rows, function: RowFunction) -> None:
        super().__init__(rows, f"through {function}")
        self._function = function

    def _remade(self) -> Iterator[tuple[dict[str, Any], Made, dict[str, Any]]]:
        before = self._begin
        for source, row in self._rows:
            behind = self._rows.mark()
            yield before, [(source, one) for one in self._made(source, row)], behind
            before = behind

    def _made(self, source: Source, row: Row | Refusal) -> list[Row | Refusal]:
        if isinstance(row, Refusal):
            return [row]
        try:
            made = self._function(row)
        except InvalidRecordError as error:
            made = [error]
        return [
            Refusal(source, one.code, one.reason) if isinstance(one, InvalidRecordError) else one
            for one in made
        ]
