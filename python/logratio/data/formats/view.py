"""A row under the names that formats know, and which of its keys were read."""

from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

from logratio.data.containers import Row, json_type
from logratio.data.formats.cells import Strings, chats_of, lists_of, parsed
from logratio.data.records import InvalidRecordError

Shape = Literal["absent", "text", "message", "messages", "strings", "empty", "flag", "number"]
"""What a value is: text, an object, a list of objects, a list of strings, an empty list …"""

_CALLED = {
    "absent": "absent",
    "text": "a string",
    "message": "an object",
    "messages": "a list of messages",
    "strings": "a list of strings",
    "empty": "an empty list",
    "flag": "a boolean",
    "number": "a number",
}


def called(shape: Shape) -> str:
    """Name a shape as a person does."""
    return _CALLED[shape]


ABSENT: Any = object()
"""What `value_at` finds where there is nothing."""


def value_at(row: Row, key: str) -> Any:
    """Find a value by its key, or by a path into objects and lists: ``summaries.0.text``.

    A key that is there as it is written comes first. An object or a list on the way may be written
    as JSON in a string.
    """
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = parsed(value) if isinstance(value, str) else value
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return ABSENT
    return value


class View:
    """A row as formats read it.

    Attributes:
        mapped: Names that settings gave a key of the row, or a format settled.
        is_plain: Whether a string under ``prompt`` was read as plain text (else as a user's turn);
            None where there was none.
        is_spelled: Whether strings spelled the chats that were read; None where nothing that was
            read could be text.
    """

    def __init__(
        self, row: Row, columns: Mapping[str, str], strings: Strings | None = None
    ) -> None:
        """Look at a row.

        Args:
            row: The row.
            columns: Its keys for names that formats know.
            strings: What a string is that spells a list of messages.
        """
        self._row = row
        self._strings = strings
        self._columns = columns
        self._read: set[str] = set()
        self._inner: dict[str, None] = {}
        self.mapped: Set[str] = columns.keys()
        self.is_plain: bool | None = None
        self.is_spelled: bool | None = None
        self._values: Mapping[str, Any] = row
        if columns:
            taken = {*columns, *columns.values()}
            values = {name: value for name, value in row.items() if name not in taken}
            found = {name: value_at(row, key) for name, key in columns.items()}
            self._values = values | {n: value for n, value in found.items() if value is not ABSENT}
        if lists := lists_of(self._values):
            self._values = {**self._values, **lists}

    def chats(self, answers: Mapping[str, Any], main: str | None) -> dict[str, Any]:
        """Return the answers; those that spell chats, and the question, become these.

        Args:
            answers: By the names that errors call them by.
            main: The name of the question.

        Raises:
            InvalidRecordError: E215 where they could be chats or text.
        """
        asked = None if main is None else self.key(main)
        question = {} if main is None else {self.key(main): self._values.get(main)}
        found = chats_of({**question, **answers}, self._strings, asked)
        if main is not None and asked in found:
            self._values = {**self._values, main: found[asked]}
        if all(isinstance(answer, str) for answer in answers.values()):
            self.is_spelled = bool(found)
        return {name: found.get(name, answer) for name, answer in answers.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def lacks(self, names: frozenset[str]) -> bool:
        """Say whether none of some names is there."""
        return names.isdisjoint(self._values)

    @property
    def row(self) -> Row:
        """The row under its own keys."""
        return self._row

    def every(self) -> list[str]:
        """Return all names, those without a value too."""
        return list(self._values)

    def settle(self, name: str) -> None:
        """Say that a name is what it is called, whatever else could be that."""
        self.mapped = {*self.mapped, name}

    def note(self, name: str) -> None:
        """Count a value as read."""
        self._read.add(self.key(name))

    def names(self) -> list[str]:
        """Return the names that have a value."""
        return [name for name, value in self._values.items() if value is not None]

    def has(self, name: str) -> bool:
        """Say whether a value is there, and not null."""
        return self._values.get(name) is not None

    def peek(self, name: str) -> Any:
        """Return a value, or None, without having read it."""
        return self._values.get(name)

    def was_read(self, name: str) -> bool:
        """Say whether a value was taken."""
        return self.key(name) in self._read

    def take(self, name: str) -> Any:
        """Read a value.

        Raises:
            InvalidRecordError: E201 where the key is missing, E202 where the value is null.
        """
        if name not in self._values:
            raise InvalidRecordError("E201", f"the key {self.key(name)!r} is missing")
        value = self._values[name]
        if value is None:
            raise InvalidRecordError("E202", f"{self.key(name)!r} is null")
        self._read.add(self.key(name))
        return value

    def text(self, name: str) -> str:
        """Read a string.

        Raises:
            InvalidRecordError: As `take`; E203 for another type.
        """
        value = self.take(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str:
        """Read a string; an absent one and null are empty.

        Raises:
            InvalidRecordError: E203 for another type.
        """
        return self.text(name) if self.has(name) else ""

    def shape(self, name: str) -> Shape:
        """Say what a value is.

        Raises:
            InvalidRecordError: E203 for a list of neither messages nor strings.
        """
        value = self._values.get(name)
        if isinstance(value, str):
            return "text"
        if value is None:
            return "absent"
        if isinstance(value, bool):
            return "flag"
        if isinstance(value, dict):
            return "message"
        return self._shape_of_list(name, value) if isinstance(value, list) else "number"

    def _shape_of_list(self, name: str, value: list[Any]) -> Shape:
        if not value:
            return "empty"
        if all(isinstance(item, dict) for item in value):
            return "messages"
        if all(isinstance(item, str) for item in value):
            return "strings"
        held = " and ".join(dict.fromkeys(map(json_type, value)))
        reason = f"{self.key(name)!r} is a list of {held}, neither of messages nor of strings"
        raise InvalidRecordError("E203", reason)

    def wrong(self, name: str, wanted: str) -> InvalidRecordError:
        """Make the error for a value of the wrong type."""
        is_a = json_type(self._values.get(name))
        return InvalidRecordError("E203", f"{self.key(name)!r} is {is_a}, not {wanted}")

    def key(self, name: str) -> str:
        """Return a name as the row spells it."""
        return self._columns.get(name, name)

    def leave(self, name: str, keys: Iterable[str]) -> None:
        """Note keys inside a value that are not read."""
        self._inner |= {f"{self.key(name)}.{key}": None for key in keys}

    def extra_keys(self) -> tuple[str, ...]:
        """Return the row's keys that were not read, and such keys inside of read ones."""
        read = {key if key in self._row else key.partition(".")[0] for key in self._read}
        return (*(key for key in self._row if key not in read), *self._inner)
