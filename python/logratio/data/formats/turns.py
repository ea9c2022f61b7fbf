"""Conversations as lists of turns: the user's in one column, each model's answers in another."""

from typing import Any

from logratio.data import conversations
from logratio.data.containers import parse_value
from logratio.data.formats.answers import Answered
from logratio.data.formats.cells import FLAGS, parsed
from logratio.data.formats.questions import read_tools, with_system
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import View
from logratio.data.messages import ASSISTANT
from logratio.data.records import InvalidRecordError, Message

_PROMPT = "prompt"


def read_turns(view: View, names: tuple[str, str], settings: FormatSettings) -> Answered | None:
    """Read two conversations whose first turns are the same question, as Chatbot Arena's 55k has.

    An answer of null is an empty one.

    Returns:
        What both share, and each one's history and last answer; None where the prompt is no list
        of turns, or is text by the user's word.

    Raises:
        InvalidRecordError: E215 where an answer is a string that spells no list, E203 where it is
            of another type, E403 where it has not as many turns as the prompt.
    """
    asked = _turns(view.peek(_PROMPT))
    if asked is None or None in asked or settings.strings == "text":
        return None
    chats = {view.key(name): _chat(view, name, asked) for name in names}
    view.is_spelled = isinstance(view.take(_PROMPT), str)
    prompt, parts = conversations.split(chats)
    return Answered(_PROMPT, with_system(view, prompt), parts, read_tools(view), is_whole=True)


def _chat(view: View, name: str, asked: list[str | None]) -> list[Message]:
    """Put the user's turns and a model's together."""
    value, prompt = view.take(name), view.key(_PROMPT)
    said = _turns(value)
    if said is None:
        if not isinstance(value, str):
            raise view.wrong(name, "a list of strings")
        reason = f"{prompt!r} spells a list of turns, and {view.key(name)!r} is plain text: {FLAGS}"
        raise InvalidRecordError("E215", reason)
    if len(said) != len(asked):
        reason = f"{view.key(name)!r} has {len(said)} turns, and {prompt!r} has {len(asked)}"
        raise InvalidRecordError("E403", reason)
    return [
        {"role": role, "content": text or ""}
        for exchange in zip(asked, said, strict=True)
        for role, text in zip(("user", ASSISTANT), exchange, strict=True)
    ]


def _turns(cell: Any) -> list[str | None] | None:
    """Return a list of strings and nulls, which may be written as JSON; None for anything else."""
    value = parsed(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list) or not value:
        return None
    if not all(item is None or isinstance(item, str) for item in value):
        return None
    if isinstance(cell, str):
        _check(cell)
    return value


def _check(text: str) -> None:
    """Refuse JSON with half a character."""
    try:
        parse_value(text)
    except InvalidRecordError:
        raise
    except ValueError:  # a repr is no JSON
        pass
