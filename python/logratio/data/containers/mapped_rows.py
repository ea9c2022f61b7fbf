"""Rows that go through a Python function of the user's before they are read as records."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from logratio.data.containers.rows import Row, Rows
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import ConfigError, SettingTypeError

_RESULTS = "a row function returns a dict, a list of dicts, or None to leave the row out"


class RowFunction:
    """A function from a row to a row, to several (a list), or to none (None).

    Attributes:
        name: Where it is, as ``module:function``.
    """

    def __init__(self, function: Callable[[Row], Any]) -> None:
        self._function = function
        module = getattr(function, "__module__", "?")
        self.name = f"{module}:{getattr(function, '__qualname__', type(function).__name__)}"

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowFunction) and self._function == other._function

    def __hash__(self) -> int:
        return hash(self._function)

    def __call__(self, row: Row) -> list[Row]:
        """Return what it makes of a row.

        Raises:
            InvalidRecordError: E217 where it fails or returns something else, R316 where it
                returns nothing.
        """
        try:
            made = self._function(row)
        except Exception as error:
            reason = f"{self} failed: {type(error).__name__}: {error}"
            raise InvalidRecordError("E217", reason) from error
        rows = made if isinstance(made, list) else [made]
        if made is None or not rows:
            raise InvalidRecordError("R316", f"{self} left the row out")
        if wrong := [one for one in rows if not isinstance(one, Mapping)]:
            got = type(wrong[0]).__name__
            raise InvalidRecordError("E217", f"{self} returned a {got}: {_RESULTS}")
        return [dict(one) for one in rows]


def as_row_function(given: Any) -> RowFunction | None:
    """Return the function that is meant: itself, or by its name, ``module:function``.

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
        return RowFunction(_imported(given))
    raise SettingTypeError(f"a {type(given).__name__} is no function, and no 'module:function'")


def _imported(name: str) -> Callable[[Row], Any]:
    module, colon, path = name.partition(":")
    if not (module and colon and path):
        raise ConfigError(f"rows {name!r}: name a function as module:function")
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


class MappedRows:
    """Rows of a container, each as what a function makes of it; see `Rows`.

    A row that the function refuses, or leaves out, comes as a refusal in its place.
    """

    def __init__(self, rows: Rows, function: RowFunction) -> None:
        self.kind = f"{rows.kind}, through {function}"
        self._rows = rows
        self._function = function
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
        """Yield what the function makes of each row, under the row's own source."""
        skip, self._skip = self._skip, 0
        before = self._rows.mark()
        for source, row in self._rows:
            behind = self._rows.mark()
            made = self._made(source, row)
            for done, one in enumerate(made, 1):
                self._mark = behind if done == len(made) else before | {"made": done}
                if done > skip:
                    yield source, one
            before, skip = behind, 0

    def _made(self, source: Source, row: Row | Refusal) -> list[Row | Refusal]:
        if isinstance(row, Refusal):
            return [row]
        try:
            return [*self._function(row)]
        except InvalidRecordError as error:
            return [Refusal(source, error.code, error.reason)]

    def columns(self) -> None:
        """Return None: the function may give each row its own keys."""
        return None

    def batches(self) -> Iterator[tuple[int, Any]]:
        """Refuse: there are no columns."""
        raise TypeError(f"{self.kind} has rows and no columns")

    def mark(self) -> dict[str, Any]:
        """Return the place behind the row that was yielded last."""
        return self._rows.mark() if self._mark is None else self._mark

    def go_on(self, mark: dict[str, Any]) -> None:
        """Let the next iteration go on at a mark."""
        own = dict(mark)
        self._skip = int(own.pop("made", 0))
        self._mark = None
        self._rows.go_on(own)
