"""What a string in a row is: text, or a list or an object that was written as text.

Containers yield strings; this file decides what they are. A list of messages that was written as
text (JSON, or Python's `repr`, as pandas writes a column of lists to CSV) is a chat if every part
of the row that could be messages is. Where only some parts are, nobody can know: the row is refused
until `FormatSettings.strings` settles it. JSON that is no list of messages is text, unless the name
takes nothing but lists: `tools`, scores, ranked answers.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from logratio.data.containers import parse_value
from logratio.data.records import InvalidRecordError

Strings = Literal["messages", "text"]
"""What a string that spells a list of messages is."""

FLAGS = (
    "add --strings messages to read every such string as a chat, or --strings text to train it as "
    "it stands"
)

LISTS = frozenset(
    ("completions", "answers", "responses", "ranks", "scores", "rewards", "error_steps")
)
"""Names under which a list stands and a string has no meaning."""

CHATS = frozenset(("messages", "conversations", "chosen_messages", "rejected_messages", "context"))
"""Names under which a list of messages can stand only for a chat."""

MAX_REPR = 1 << 20
"""Most characters of Python's `repr` that are parsed: it takes a hundred times as many bytes."""

_OPENS = ("[", "{")
_SPACE = " \t\r\n"
_CHAT_OPENS = re.compile(r"\s*(?:\[\s*)?\{")
_LOOKS_LIKE_CHAT = re.compile(r"""\s*\[\s*\{\s*(['"])(?:role|content|from|value)\1\s*:""")
_ROWS_OF_NUMPY = re.compile(r"\}\n\s*\{")  # a line end cannot be inside a string of a repr


def opens(text: str) -> bool:
    """Say whether a string may spell a list or an object: a quick look at its first character."""
    if text[:1] in _SPACE:
        text = text.lstrip(_SPACE)
    return text.startswith(_OPENS)


def parsed(text: str) -> Any:
    """Return the list or object that a string spells; None if it spells none.

    JSON is read first, then Python's `repr`, also that of an array of objects in NumPy, up to
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
    """Return the messages that a string spells: a list, one message, or None if it spells none.

    Args:
        text: The string.
        in_object: Take an object with a list of ``messages``, too.

    Raises:
        InvalidRecordError: E205 or E104 where it is JSON of a kind that is refused.
    """
    if not _CHAT_OPENS.match(text):
        return None
    value = parsed(text)
    holds = in_object and isinstance(value, dict) and _is_chat(value.get("messages"))
    if not holds and not _is_chat(value):
        return None
    try:
        parse_value(text)
    except ValueError as error:  # a repr is no JSON
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
    """Return what strings spell under names that take nothing but a list."""
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
    """Say whether earlier turns are spelled: messages, or pairs of a question and its answer."""
    if not isinstance(value, list):
        return False
    return _is_chat(value) or all(_is_strings(item) and len(item) == 2 for item in value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def chats_of(
    cells: Mapping[str, Any], strings: Strings | None, asked: str | None
) -> dict[str, Any]:
    """Return the chats that cells of a row spell; nothing where they are text.

    Args:
        cells: The question and the answers, by the names that errors call them by.
        strings: What such strings are, if the user settled it.
        asked: Which of the cells is the question.

    Raises:
        InvalidRecordError: E215 where some are chats and some are text, or where a string begins
            like a chat and cannot be parsed.
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
            f"{name!r} begins like a list of messages that was written as text, and cannot be "
            "parsed: write it as JSON, or add --strings text to train it as it stands"
        )
        raise InvalidRecordError("E215", reason)


def _repeats(
    cells: Mapping[str, Any], chats: Mapping[str, Any], asked: str | None, plain: list[str]
) -> bool:
    """Say whether the only text is a question that every answer, a whole chat, holds as a turn."""
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
