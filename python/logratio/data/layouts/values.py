"""A value of an object inside of a row, checked."""

from collections.abc import Mapping
from typing import Any, TypeVar

from logratio.data.readers.json import json_type
from logratio.data.records import InvalidRecordError

Row = dict[str, Any]
Part = Row | InvalidRecordError
"""A row that was made, or why one was not."""

T = TypeVar("T", dict[str, Any], list[Any], str)
_CALLED = {dict: "an object", list: "a list", str: "a string"}


def take(holder: Mapping[str, Any], key: str, kind: type[T], where: str = "the row") -> T:
    """Return the value under a key.

    Args:
        holder: The row, or an object in it.
        key: The key.
        kind: ``dict``, ``list`` or ``str``.
        where: What errors call the holder.

    Raises:
        InvalidRecordError: E201 where the key is missing, E203 where the value is of another type.
    """
    if key not in holder:
        raise InvalidRecordError("E201", f"{where} has no {key!r}")
    return checked(holder[key], kind, f"{key!r} of {where}")


def checked(value: Any, kind: type[T], what: str) -> T:
    """Return a value of a type.

    Raises:
        InvalidRecordError: E203 for another type.
    """
    if not isinstance(value, kind):
        reason = f"{what} is {json_type(value)}, not {_CALLED[kind]}"
        raise InvalidRecordError("E203", reason)
    return value


def is_number(value: object) -> bool:
    """Say whether a value is a number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
