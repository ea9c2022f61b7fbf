"""Rows derived from other rows: merged by a key, or passed through a Python function."""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from logratio.data.readers.rows import Row, Rows
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import ConfigError, SettingTypeError

DerivedRecords = Sequence[tuple[Source, Row | Refusal]]
"""Rows or refusals derived from some rows, each with its source."""


class DerivedRows(ABC):
    """Base class of containers that derive their rows from another container; see `Rows`.

    A mark holds a mark of that container and the number of derived rows already yielded after it.
    """

    def __init__(self, rows: Rows, how: str) -> None:
        self.kind = f"{rows.kind}, {how}"
        self._rows = rows
        self._begin: dict[str, Any] = {}  # mark of the inner rows; empty: the first row
        self._skip = 0
        self._mark: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Name of the inner container."""
        return self._rows.name

    @property
    def size(self) -> int | None:
        """Size of the inner container."""
        return self._rows.size

    @property
    def position(self) -> int:
        """Amount of `size` read so far."""
        return self._rows.position

    @property
    def blank_lines(self) -> int:
        """Number of blank lines so far."""
        return self._rows.blank_lines

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield the derived rows in the order of the inner rows."""
        self._mark, skip = None, self._skip
        for before, made, behind in self._derive():
            for done, part in enumerate(made, 1):
                is_last = done == len(made)
                self._mark = _marked(behind, 0) if is_last else _marked(before, done)
                if done > skip:
                    yield part
            skip = 0

    @abstractmethod
    def _derive(self) -> Iterator[tuple[dict[str, Any], DerivedRecords, dict[str, Any]]]:
        """Yield the mark before some inner rows, the rows derived from them, and the mark after.

        The first mark is `_begin`. Reading again from a mark must derive the same rows.
        """

    def columns(self) -> None:
        """Return None: each row has its own keys."""
        return None

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Raise TypeError: rows of text have no columns."""
        raise TypeError(f"{self.kind} has rows and no columns")

    def mark(self) -> dict[str, Any]:
        """Return the position after the row that was yielded last."""
        return _marked(self._begin, self._skip) if self._mark is None else self._mark

    def resume_from(self, mark: dict[str, Any]) -> None:
        """Start the next iteration at a mark."""
        self._begin, self._skip, self._mark = dict(mark.get("rows", {})), mark.get("made", 0), None
        self._rows.resume_from(self._begin)


def _marked(rows: dict[str, Any], made: int) -> dict[str, Any]:
    return {"rows": rows, "made": made}


MOST = 1024
"""Most rows merged into one, and most refusals held back until a group ends."""


class GroupedRows(DerivedRows):
    """Merge adjacent rows that have equal values under a key; see `Rows`.

    Only adjacent rows are compared, so memory stays bounded for files of any size. The merged row
    has the key with its value and, under every other key, the list of its rows' values, None where
    a row lacks the key. Its source is that of its first row. Refusals between the rows follow the
    merged row and do not end the group.
    """

    def __init__(self, rows: Rows, key: str) -> None:
        super().__init__(rows, f"rows of one {key!r} together")
        self._key = key

    def _derive(self) -> Iterator[tuple[dict[str, Any], DerivedRecords, dict[str, Any]]]:
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
    """Adjacent rows with one value, and the refusals among them."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._rows: list[Row] = []
        self._first: Source | None = None
        self._value: Any = None
        self._count = 0
        self._refused: list[tuple[Source, Refusal]] = []
        self._leading = 0  # refusals before the first row

    def takes(self, source: Source, row: Row | Refusal) -> bool:
        """Add a row that has the group's value, or any row to an empty group; return whether."""
        if not isinstance(row, Refusal) and row.get(self._key) is None:
            is_there = self._key in row
            reason = f"{self._key!r} is null" if is_there else f"the key {self._key!r} is missing"
            reason += ", but --group-by merges rows by it"
            row = Refusal(source, "E202" if is_there else "E201", reason)
        if isinstance(row, Refusal):
            if len(self._refused) >= MOST:
                return False
            self._refused.append((source, row))
            return True
        if self._first is None:
            self._first, self._value = source, row[self._key]
            self._leading = len(self._refused)
        elif row[self._key] != self._value:
            return False
        self._count += 1
        if self._count <= MOST:
            self._rows.append(row)
        return True

    def made(self) -> DerivedRecords:
        """Return the merged row, or the refusal in its place, and the refusals among its rows."""
        if self._first is None:
            return self._refused
        row = self._together(self._first)
        at = self._leading
        return [*self._refused[:at], (self._first, row), *self._refused[at:]]

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

    The function may raise an `InvalidRecordError`, or return some in its list: each is counted as a
    refusal with the error's code.

    Attributes:
        name: Where the function is, as ``module:function``, or the name of a layout.
    """

    def __init__(self, function: Callable[[Row], Any], name: str | None = None) -> None:
        self._function = function
        module = getattr(function, "__module__", "?")
        where = f"{module}:{getattr(function, '__qualname__', type(function).__name__)}"
        self.name = name or where

    def __str__(self) -> str:
        return self.name

    def to_flag(self) -> str | None:
        """Return the name that reads as this function; None for a lambda or an inner function."""
        return None if "<" in self.name else self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowFunction) and self._function == other._function

    def __hash__(self) -> int:
        return hash(self._function)

    def __call__(self, row: Row) -> list[Row | InvalidRecordError]:
        """Apply the function to a row.

        Returns:
            The rows that it returns, and the errors among them.

        Raises:
            InvalidRecordError: E217 if the function fails or returns another type, R316 if it
                returns nothing, or the error that it raises itself.
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
    """Resolve a row function: a callable, the name of a layout, or ``module:function``.

    Modules are also searched in the working directory, as ``python -m`` does.

    Raises:
        ConfigError: The module does not exist, or it has no such function.
        SettingTypeError: The value is neither a callable nor a string.
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
    raise SettingTypeError(f"a {type(given).__name__} is not a function or 'module:function'")


def _imported(name: str) -> Callable[[Row], Any]:
    from logratio.data.layouts import LAYOUTS

    module, colon, path = name.partition(":")
    if not (module and colon and path):
        known = ", ".join(LAYOUTS)
        raise ConfigError(f"--rows {name!r}: name a function as module:function, or one of {known}")
    found: Any = _module(module, name)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"--rows {name!r}: {module} has no function {path}")
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
                f"--rows {name!r}: {module} needs {error.name}, which is missing"
            ) from error
        hint = f" (name the module, {module[:-3]})" if module.endswith(".py") else ""
        raise ConfigError(
            f"--rows {name!r}: no module {error.name!r}, neither in the working directory nor "
            f"installed{hint}"
        ) from error
    finally:
        sys.path.remove(here)


class MappedRows(DerivedRows):
    """Apply a function to each row of a container; see `Rows`.

    A row that the function refuses or leaves out is yielded as a refusal.
    """

    def __init__(self, rows: Rows, function: RowFunction) -> None:
        super().__init__(rows, f"through {function}")
        self._function = function

    def _derive(self) -> Iterator[tuple[dict[str, Any], DerivedRecords, dict[str, Any]]]:
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
