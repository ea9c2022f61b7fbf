"""A command's parameter that stands for many flags, each described once."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from typing import Any, get_type_hints

Command = Callable[..., None]


def takes_flags(command: Command) -> Command:
    """Spread a command's dataclasses: every field is a flag of its own, in the parameter's place.

    The command has a default for such a parameter, whose fields are the flags' defaults.
    """
    own = inspect.signature(command).parameters.values()
    groups: dict[str, type[Any]] = {p.name: type(p.default) for p in own if is_dataclass(p.default)}

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    spread = [flag for parameter in own for flag in _flags(parameter)]
    called.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    called.__annotations__ = {flag.name: flag.annotation for flag in spread}
    return called


def _flags(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return a parameter, or those of the dataclass that it stands for."""
    given = parameter.default
    if not is_dataclass(given):
        return [parameter]
    hints = get_type_hints(type(given), include_extras=True)
    return [
        parameter.replace(
            name=field.name, default=getattr(given, field.name), annotation=hints[field.name]
        )
        for field in fields(given)
    ]


@dataclass(frozen=True)
class Settings:
    """Flags that are called as the fields of a command's config that they fill."""

    def settings(self) -> dict[str, Any]:
        """Return them as the config takes them: words, and tuples of what was repeated."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    return (tuple(value) or None) if isinstance(value, list) else value
