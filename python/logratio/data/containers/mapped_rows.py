"""Rows that go through a Python function of the user's before they are read as records."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from logratio.data.containers.remade_rows import Made, RemadeRows
from logratio.data.containers.rows import Row, Rows
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.errors import ConfigError, SettingTypeError

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
