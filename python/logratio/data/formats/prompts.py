"""The question of a row: the part that the model reads before it answers.

A string under ``prompt`` is plain text and is not changed: it already contains the speakers' names
or the template's tokens. Every other key names a part of a chat (a question, an instruction, a
system prompt, a history). These become messages, which the model's chat template renders. So does
``prompt`` if the row also has a system prompt or a history.
"""

from dataclasses import dataclass
from typing import Any

from logratio.data import conversations
from logratio.data.formats.row import RowView, parsed
from logratio.data.messages import Turns, read_messages
from logratio.data.records import InvalidRecordError, Message, Text

MAINS = (
    *("prompt", "messages", "conversations", "context"),
    *("question", "instruction", "query", "input", "history"),
)
"""Names that may hold the question."""

SYSTEM, HISTORY, TOOLS = ("system", "system_prompt"), "history", "tools"

_MEDIA = ("images", "image", "videos", "video", "audios", "audio")

BEFORE = (*SYSTEM, HISTORY, TOOLS, "context", "input", "initial_reason_steps", *_MEDIA)
"""Names of other parts of the prompt; a row in which one is not read is refused."""

_BEFORE = frozenset(BEFORE)


@dataclass(frozen=True, slots=True)
class Question:
    """The part of a row before the answers.

    Attributes:
        main: The name under which it was found. None: the answers contain it.
        prompt: Plain text, or the turns of a chat.
        tools: Descriptions of the functions that the assistant may call.
    """

    main: str | None
    prompt: Text = ""
    tools: tuple[Message, ...] = ()

    def turns(self) -> Turns:
        """Return the question as a chat."""
        return (_user(self.prompt),) if isinstance(self.prompt, str) else self.prompt


def find_main(view: RowView) -> str | None:
    """Return the name that holds a row's question, or None.

    Raises:
        InvalidRecordError: E210 if several names could hold it.
    """
    found = [name for name in MAINS if view.has(name) and _can_ask(view, name)]
    if len(found) > 1:
        found = [name for name in found if name in view.mapped] or found
    if "instruction" in found:
        found = [
            name for name in found if name != "input"
        ]  # alpaca appends `input` to the instruction
    if len(found) > 1:
        found = [name for name in found if view.peek(name)] or found[:1]
    if len(found) > 1:
        names = " and ".join(f"`{view.key(name)}`" for name in found)
        flags = " or ".join(f"--columns {name}={view.key(name)}" for name in found)
        reason = f"{names} could each be the question: choose one with {flags}"
        raise InvalidRecordError("E210", reason)
    return found[0] if found else None


def read_question(view: RowView, main: str) -> Question:
    """Parse the question under a name, with its system prompt, history and tools.

    Raises:
        InvalidRecordError: E2xx for malformed values, E403 for turns without a question.
    """
    value = view.take(main)
    if main == "input" and isinstance(value, dict):
        return _openai(view, value)
    if isinstance(value, dict) and isinstance(value.get("full_text"), str):  # WebGPT's
        view.leave(main, [key for key in value if key != "full_text"])
        value = value["full_text"]
    if isinstance(value, list):
        turns = conversations.prompt(value, view.key(main))
        return Question(main, with_system(view, turns), read_tools(view))
    if not isinstance(value, str):
        raise view.wrong(main, "a string or a list of messages")
    if main == "prompt":
        view.is_plain = not any(name in view for name in (*SYSTEM, HISTORY))
        if view.is_plain:
            return Question(main, value)
    if main == "instruction" and (more := view.optional_text("input")):
        value = f"{value}\n{more}"
    history = () if main == HISTORY else _history(view)
    turns = with_system(view, (*history, _user(value)))
    return Question(main, turns, read_tools(view))


def read_tools(view: RowView) -> tuple[Message, ...]:
    """Parse the descriptions of functions that the assistant may call, possibly JSON in a string.

    Raises:
        InvalidRecordError: E203 if they are not a list of objects.
    """
    return _tools(view.take(TOOLS), view.key(TOOLS)) if view.has(TOOLS) else ()


def with_system(view: RowView, turns: Turns) -> Turns:
    """Prepend the row's system prompt to a chat, unless the chat already begins with it.

    Raises:
        InvalidRecordError: E203 if it is not a string, E206 if the chat has a different one.
    """
    for name in SYSTEM:
        system = view.optional_text(name)
        if not system or system == turns[0].get("content"):
            continue
        if turns[0]["role"] == "system":
            reason = f"{view.key(name)!r} and the chat's system turn differ"
            raise InvalidRecordError("E206", reason)
        turns = ({"role": "system", "content": system}, *turns)
    return turns


def check_unread(view: RowView) -> None:
    """Refuse a row that would be trained without a part of its prompt.

    Raises:
        InvalidRecordError: E206, naming the part.
    """
    if view.lacks(_BEFORE):
        return
    for name in BEFORE:
        if view.peek(name) and not view.was_read(name) and name not in view.mapped:
            raise InvalidRecordError("E206", _unread(view, name))


def _unread(view: RowView, name: str) -> str:
    """Return a sentence about a part of the prompt that is not read, and what to do."""
    if name in _MEDIA:
        return (
            f"{view.key(name)!r} is part of the prompt, but only text is supported: remove such "
            "rows, or remove this key if the text is complete without it"
        )
    reason = f"{view.key(name)!r} is part of the prompt, but is not read"
    if name == TOOLS:
        return f"{reason}: with tools, write prompt and answers as lists of messages"
    return f"{reason}: move it into the prompt"


def _can_ask(view: RowView, name: str) -> bool:
    if name == HISTORY:  # SHP's post; in other formats, and as a list, earlier turns
        rest = [other for other in MAINS if other != HISTORY]
        return isinstance(view.peek(name), str) and not any(map(view.has, rest))
    return name != "context" or isinstance(view.peek(name), list)


def _openai(view: RowView, value: dict[str, Any]) -> Question:
    """Parse OpenAI's `input` object, which holds the question."""
    messages = value.get("messages")
    if not isinstance(messages, list):
        code = "E201" if "messages" not in value else "E203"
        raise InvalidRecordError(code, f"{view.key('input')!r} holds no list of 'messages'")
    view.leave("input", [key for key in value if key not in ("messages", TOOLS)])
    turns = conversations.prompt(messages, "input.messages")
    return Question("input", turns, _tools(value.get("tools"), "input.tools"))


def _history(view: RowView) -> Turns:
    """Parse earlier turns: messages, or [question, answer] pairs."""
    value = view.take(HISTORY) if view.has(HISTORY) else None
    if not value:
        return ()
    key = view.key(HISTORY)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return tuple(_weightless(read_messages(value, key)))
    if not isinstance(value, list) or not all(_is_exchange(item) for item in value):
        reason = f"{key!r} is not a list of [question, answer]"
        raise InvalidRecordError("E203", reason)
    roles = ("user", "assistant")
    return tuple(
        {"role": role, "content": text}
        for exchange in value
        for role, text in zip(roles, exchange, strict=True)
    )


def _weightless(turns: Turns) -> Turns:
    return tuple({key: item for key, item in turn.items() if key != "weight"} for turn in turns)


def _is_exchange(item: Any) -> bool:
    is_two = isinstance(item, list) and len(item) == 2
    return is_two and all(isinstance(text, str) for text in item)


def _tools(value: Any, key: str) -> tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        spelled = parsed(value)
        if spelled is None:
            raise InvalidRecordError("E203", f"{key!r} is a string, but not JSON")
        value = spelled
    if not value or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InvalidRecordError("E203", f"{key!r} is not a list of objects")
    return tuple(value)


def _user(text: Text) -> Message:
    return {"role": "user", "content": text}
