"""A row under the names that formats read, with lists and chats parsed from its strings."""

import ast
import json
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

from logratio.data.readers.json import json_type, parse_value
from logratio.data.readers.rows import Row
from logratio.data.records import InvalidRecordError

Strings = Literal["messages", "text"]
"""How to read a string that spells a list of messages."""

FLAGS = (
    "add --strings messages to read every such string as a chat, or --strings text to train it "
    "unchanged"
)

LISTS = frozenset(
    ("completions", "answers", "responses", "ranks", "scores", "rewards", "error_steps")
)
"""Names that always hold a list; a string there is parsed."""

CHATS = frozenset(("messages", "conversations", "chosen_messages", "rejected_messages", "context"))
"""Names under which a list of messages is always a chat."""

MAX_REPR = 1 << 20
"""Longest Python `repr` that is parsed: parsing needs about a hundred bytes per character."""

_OPENS = ("[", "{")
_SPACE = " \t\r\n"
_CHAT_OPENS = re.compile(r"\s*(?:\[\s*)?\{")
_LOOKS_LIKE_CHAT = re.compile(r"""\s*\[\s*\{\s*(['"])(?:role|content|from|value)\1\s*:""")
_ROWS_OF_NUMPY = re.compile(r"\}\n\s*\{")  # a line end cannot be inside a string of a repr


def opens(text: str) -> bool:
    """Return whether a string may spell a list or an object, from its first character."""
    if text[:1] in _SPACE:
        text = text.lstrip(_SPACE)
    return text.startswith(_OPENS)


def parsed(text: str) -> Any:
    """Return the list or object that a string spells, or None.

    JSON is tried first, then Python's `repr` (also of a NumPy array of objects) of up to
    `MAX_REPR` characters.
    """
    if not opens(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _literal(text.strip())
    return value if isinstance(value, list | dict) else None


def _literal(text: str) -> Any:
    if len(text) > MAX_REPR:
        return None
    try:
        return ast.literal_eval(_ROWS_OF_NUMPY.sub("}, {", text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def chat(text: str, *, in_object: bool = False) -> Any:
    """Return the messages that a string spells: a list, one message, or None.

    Args:
        text: The string.
        in_object: Also accept an object with a list of ``messages``.

    Raises:
        InvalidRecordError: E205 for a repeated key in JSON, E104 for a lone surrogate.
    """
    if not _CHAT_OPENS.match(text):
        return None
    value = parsed(text)
    holds = in_object and isinstance(value, dict) and _is_chat(value.get("messages"))
    if not holds and not _is_chat(value):
        return None
    try:
        parse_value(text)
    except ValueError as error:  # a repr is not JSON
        if isinstance(error, InvalidRecordError):
            raise
    return value


def _is_chat(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_message(value)
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if "role" in value:
        return not value.keys().isdisjoint(("content", "tool_calls", "function_call"))
    return "from" in value and "value" in value


def lists_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the strings under names that always hold a list."""
    found = {}
    for name in _names_of_lists(values):
        text = values[name]
        if isinstance(text, str) and (value := _list_under(name, text)) is not None:
            found[name] = value
    return found


def _names_of_lists(values: Mapping[str, Any]) -> Iterable[str]:
    names = values.keys() & (LISTS | CHATS | {"history"})
    if "text" in values and "score" in values:
        names |= {"text", "score"}
    if "first_diff" in values or "error_steps" in values:
        names |= values.keys() & {"chosen", "rejected"}
    return names


def _list_under(name: str, text: str) -> list[Any] | None:
    if name in CHATS:
        value = chat(text)
    else:
        value = parsed(text)
        if name == "history" and not _is_history(value):
            return None
        if name in ("chosen", "rejected") and not _is_strings(value):
            return None
    return value if isinstance(value, list) else None


def _is_history(value: Any) -> bool:
    """Return whether a value is earlier turns: messages, or [question, answer] pairs."""
    if not isinstance(value, list):
        return False
    return _is_chat(value) or all(_is_strings(item) and len(item) == 2 for item in value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def chats_of(
    cells: Mapping[str, Any], strings: Strings | None, asked: str | None
) -> dict[str, Any]:
    """Return the chats that the strings of a row spell; empty if they are text.

    Args:
        cells: The question and the answers, by their names in errors.
        strings: The user's choice, if there is one.
        asked: The name of the question.

    Raises:
        InvalidRecordError: E215 if some strings are chats and others text, or if one begins like a
            chat and cannot be parsed.
    """
    if strings == "text":
        return {}
    texts = {name: cell for name, cell in cells.items() if isinstance(cell, str)}
    if not any(map(opens, texts.values())):
        return {}
    found = {name: chat(text, in_object=name == asked) for name, text in texts.items()}
    chats = {name: value for name, value in found.items() if value is not None}
    rest = {name: texts[name] for name, value in found.items() if value is None}
    for name, text in rest.items():
        _check_whole(name, text)
    empty: dict[str, list[Any]] = {
        name: [] for name, text in rest.items() if chats and text.strip() == "[]"
    }
    plain = [name for name, text in rest.items() if name not in empty and text.strip()]
    if chats and plain and strings is None and not _repeats(cells, chats, asked, plain):
        raise InvalidRecordError("E215", _sentence(list(chats), plain))
    return chats | empty


def _check_whole(name: str, text: str) -> None:
    if _LOOKS_LIKE_CHAT.match(text) and parsed(text) is None:
        reason = (
            f"{name!r} begins like a list of messages that was written as text, but cannot be "
            "parsed: write it as JSON, or add --strings text to train it unchanged"
        )
        raise InvalidRecordError("E215", reason)


def _repeats(
    cells: Mapping[str, Any], chats: Mapping[str, Any], asked: str | None, plain: list[str]
) -> bool:
    """Return whether the only text is the question, and every answer is a chat that repeats it."""
    if plain != [asked]:
        return False
    question = cells[plain[0]].strip()
    return all(
        question in [str(turn.get("content", turn.get("value"))).strip() for turn in value]
        for value in chats.values()
        if isinstance(value, list)
    )


def _sentence(chats: list[str], plain: list[str]) -> str:
    first, second = (" and ".join(map(repr, names)) for names in (chats, plain))
    are = "spells a list of messages" if len(chats) == 1 else "spell lists of messages"
    return f"{first} {are}, and {second} is plain text: {FLAGS}"


Shape = Literal["absent", "text", "message", "messages", "strings", "empty", "flag", "number"]
"""The type of a value, as far as formats distinguish it."""

_SHAPE_NAMES = {
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
    """Return the name of a shape for messages."""
    return _SHAPE_NAMES[shape]


ABSENT: Any = object()
"""Result of `value_at` for a missing key."""


def value_at(row: Row, key: str) -> Any:
    """Return the value at a key, or at a path into objects and lists: ``summaries.0.text``.

    A key that matches literally, dots included, takes precedence. An object or list on the path
    may be JSON in a string. Returns `ABSENT` if nothing is found.
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


class RowView:
    """A row as formats read it; it records which keys were read.

    Attributes:
        mapped: Names that the settings mapped to a key of the row, or that a format chose.
        is_plain: Whether a string under ``prompt`` was read as plain text rather than as a user
            turn. None: no such string.
        is_spelled: Whether the chats were parsed from strings. None: no value could have been
            text.
    """

    def __init__(
        self, row: Row, columns: Mapping[str, str], strings: Strings | None = None
    ) -> None:
        """Map the row's keys and parse its lists.

        Args:
            row: The row.
            columns: Its key or path for each mapped name.
            strings: How to read a string that spells a list of messages.
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
        """Return the answers, with chats in place of strings that spell them; so for the question.

        Args:
            answers: The answers by their names in errors.
            main: The name of the question.

        Raises:
            InvalidRecordError: E215 if they could be chats or text.
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
        """Return whether the row has none of the names."""
        return names.isdisjoint(self._values)

    @property
    def row(self) -> Row:
        """The row with its original keys."""
        return self._row

    def every(self) -> list[str]:
        """Return all names, including those whose value is null."""
        return list(self._values)

    def settle(self, name: str) -> None:
        """Prefer a name over other candidates, as if `columns` had mapped it."""
        self.mapped = {*self.mapped, name}

    def note(self, name: str) -> None:
        """Record a value as read."""
        self._read.add(self.key(name))

    def names(self) -> list[str]:
        """Return the names whose value is not null."""
        return [name for name, value in self._values.items() if value is not None]

    def has(self, name: str) -> bool:
        """Return whether a value is present and not null."""
        return self._values.get(name) is not None

    def peek(self, name: str) -> Any:
        """Return a value, or None, without recording it as read."""
        return self._values.get(name)

    def was_read(self, name: str) -> bool:
        """Return whether a value was read."""
        return self.key(name) in self._read

    def take(self, name: str) -> Any:
        """Read a value.

        Raises:
            InvalidRecordError: E201 if the key is missing, E202 if the value is null.
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
            InvalidRecordError: As `take`; E203 if it is not a string.
        """
        value = self.take(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str:
        """Read a string; a missing key and null give "".

        Raises:
            InvalidRecordError: E203 if it is not a string.
        """
        return self.text(name) if self.has(name) else ""

    def shape(self, name: str) -> Shape:
        """Return the shape of a value.

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
        """Build the error for a value of the wrong type."""
        is_a = json_type(self._values.get(name))
        return InvalidRecordError("E203", f"{self.key(name)!r} is {is_a}, not {wanted}")

    def key(self, name: str) -> str:
        """Return the row's key for a name."""
        return self._columns.get(name, name)

    def leave(self, name: str, keys: Iterable[str]) -> None:
        """Record keys inside a value that are not read."""
        self._inner |= {f"{self.key(name)}.{key}": None for key in keys}

    def extra_keys(self) -> tuple[str, ...]:
        """Return the row's keys that were not read, and the unread keys inside values that were."""
        read = {key if key in self._row else key.partition(".")[0] for key in self._read}
        return (*(key for key in self._row if key not in read), *self._inner)
