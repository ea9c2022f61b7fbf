"""Chat messages: are they sound, where does the prompt end, what of the rest is an answer."""

from collections.abc import Sequence
from typing import Any

from logratio.data.containers.json_text import json_type
from logratio.data.records import InvalidRecordError, Message

_ASSISTANT = "assistant"
Turns = tuple[Message, ...]


def prompt(value: Sequence[Any], name: str) -> Turns:
    """Check the turns before an answer.

    Raises:
        InvalidRecordError: E2xx for malformed messages; E403 unless a user's turn is among them
            and the last is not the assistant's.
    """
    turns = _messages(value, name)
    if not any(turn["role"] == "user" for turn in turns):
        raise InvalidRecordError("E403", f"{name!r} holds no user turn")
    if turns[-1]["role"] == _ASSISTANT:
        raise InvalidRecordError(
            "E403", f"{name!r} ends with an assistant turn, so nothing asks for another"
        )
    return turns


def answer(value: Sequence[Any], name: str) -> Turns:
    """Check the turns of an answer: the assistant begins and ends; tools may stand between.

    Raises:
        InvalidRecordError: E2xx for malformed messages, E403 for other roles, R301 for no message.
    """
    if not value:
        raise InvalidRecordError("R301", f"{name!r} is an empty list")
    turns = _messages(value, name)
    if turns[0]["role"] != _ASSISTANT or turns[-1]["role"] != _ASSISTANT:
        raise InvalidRecordError("E403", f"{name!r} must begin and end with an assistant turn")
    return turns


def split(sides: dict[str, Sequence[Any]]) -> tuple[Turns, list[tuple[Turns, Turns]]]:
    """Split whole chats into the turns that they share and what each one goes on with.

    The prompt ends before an assistant's turn and is the same in all. A side's own turns up to
    its last user turn are history that does not count; the answer is what follows.

    Raises:
        InvalidRecordError: E2xx for malformed messages; E403 where no user turn is shared or a
            chat does not end with the assistant.
    """
    chats = [_messages(value, name) for name, value in sides.items()]
    for name, chat in zip(sides, chats, strict=True):
        if not chat or chat[-1]["role"] != _ASSISTANT:
            raise InvalidRecordError(
                "E403", f"the chat in {name!r} does not end with an assistant turn"
            )
    end = _shared(chats)
    while end and not _asks(chats, end):
        end -= 1
    shared = " and ".join(repr(name) for name in sides)
    start = prompt(chats[0][:end], f"the shared beginning of {shared}")
    parts = [_history_and_answer(chat[end:]) for chat in chats]
    for name, (_, own) in zip(sides, parts, strict=True):
        answer(own, f"the answer of {name}")
    return start, parts


def split_demonstration(value: Sequence[Any]) -> tuple[Turns, Turns]:
    """Split a chat before the assistant's first turn; every assistant turn is then an answer."""
    turns = _messages(value, "messages")
    first = next((i for i, turn in enumerate(turns) if turn["role"] == _ASSISTANT), len(turns))
    return prompt(turns[:first], "messages"), answer(turns[first:], "messages")


def words(turns: Turns) -> str:
    """Return what the assistant says in these turns; a call of a tool is something said."""
    said = (str(turn.get("content") or turn.get("tool_calls") or "") for turn in turns)
    return "".join(
        text for turn, text in zip(turns, said, strict=True) if turn["role"] == _ASSISTANT
    )


def _shared(chats: list[Turns]) -> int:
    """Count the turns that begin every chat, leaving each at least one of its own."""
    longest = min(map(len, chats)) - 1
    first, *others = chats
    for index in range(longest):
        if any(other[index] != first[index] for other in others):
            return index
    return longest


def _asks(chats: list[Turns], end: int) -> bool:
    """Say whether the assistant, and nobody before it, speaks next in every chat."""
    is_next = all(chat[end]["role"] == _ASSISTANT for chat in chats)
    return is_next and chats[0][end - 1]["role"] != _ASSISTANT


def _history_and_answer(turns: Turns) -> tuple[Turns, Turns]:
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    end = users[-1] + 1 if users else 0
    return turns[:end], turns[end:]


def _messages(value: Sequence[Any], name: str) -> Turns:
    for index, message in enumerate(value):
        _check_message(message, f"message {index + 1} of {name!r}")
    # As transformers does: an absent key renders well where a null one would read "None".
    return tuple({k: v for k, v in message.items() if v is not None} for message in value)


def _check_message(message: object, name: str) -> None:
    if not isinstance(message, dict):
        is_a = json_type(message)
        raise InvalidRecordError("E203", f"{name} is {is_a}, not an object {{role, content}}")
    # A call of a tool may say nothing.
    keys = ("role",) if message.get("tool_calls") else ("role", "content")
    for key in keys:
        if key not in message:
            raise InvalidRecordError("E201", f"{name} has no {key!r}")
        if message[key] is None:
            raise InvalidRecordError("E202", f"the {key} of {name} is null")
    for key in ("role", "content"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            is_a = json_type(value)
            raise InvalidRecordError("E203", f"the {key} of {name} is {is_a}, not a string")
