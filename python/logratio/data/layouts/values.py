"""Type checks for values inside a row."""

from collections.abc import Mapping
from typing import Any, TypeVar

from logratio.data.readers.json import json_type
from logratio.data.records import InvalidRecordError

Row = dict[str, Any]
Part = Row | InvalidRecordError
"""A converted row, or the error that explains why it was left out."""

T = TypeVar("T", dict[str, Any], list[Any], str)
_CALLED = {dict: "an object", list: "a list", str: "a string"}


def take(holder: Mapping[str, Any], key: str, kind: type[T], where: str = "the row") -> T:
    """Return the value under a key.

    Args:
        holder: The row, or an object in it.
        key: The key.
        kind: ``dict``, ``list`` or ``str``.
        where: The name of the holder in errors.

    Raises:
        InvalidRecordError: E201 if the key is missing, E203 if the value has another type.
    """
    if key not in holder:
        raise InvalidRecordError("E201", f"{where} has no {key!r}")
    return checked(holder[key], kind, f"{key!r} of {where}")


def checked(value: Any, kind: type[T], what: str) -> T:
    """Return a value, after checking its type.

    Raises:
        InvalidRecordError: E203 if the value has another type.
    """
    if not isinstance(value, kind):
        reason = f"{what} is {json_type(value)}, not {_CALLED[kind]}"
        raise InvalidRecordError("E203", reason)
    return value


def is_number(value: object) -> bool:
    """Return whether a value is a number and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
