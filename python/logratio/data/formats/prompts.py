"""The question of a row: what the model reads before it answers.

A string under ``prompt`` is text that the model reads as it stands: whoever wrote it put the
speakers' names, or a template's tokens, into it. Every other key names a part of a chat (a
question, an instruction, a system prompt, a history): those become messages, which the model's own
template writes out. So does ``prompt`` where a system prompt or a history stands beside it.
"""

from dataclasses import dataclass
from typing import Any

from logratio.data import conversations
from logratio.data.formats.row import View, parsed
from logratio.data.messages import Turns, read_messages
from logratio.data.records import InvalidRecordError, Message, Text

MAINS = (
    *("prompt", "messages", "conversations", "context"),
    *("question", "instruction", "query", "input", "history"),
)
"""Names under which a question may stand."""

SYSTEM, HISTORY, TOOLS = ("system", "system_prompt"), "history", "tools"

_MEDIA = ("images", "image", "videos", "video", "audios", "audio")

BEFORE = (*SYSTEM, HISTORY, TOOLS, "context", "input", "initial_reason_steps", *_MEDIA)
"""Names of what the model has to see before it answers: never left out in silence."""

_BEFORE = frozenset(BEFORE)


@dataclass(frozen=True, slots=True)
class Question:
    """What stands before the answers.

    Attributes:
        main: The name that it was found under; None where the answers carry it.
        prompt: Plain text, or turns of a chat.
        tools: What the assistant may call.
    """

    main: str | None
    prompt: Text = ""
    tools: tuple[Message, ...] = ()

    def turns(self) -> Turns:
        """Return the question as a chat."""
        return (_user(self.prompt),) if isinstance(self.prompt, str) else self.prompt


def find_main(view: View) -> str | None:
    """Find the name under which a row's question stands; None where there is none.

    Raises:
        InvalidRecordError: E210 where there are several.
    """
    found = [name for name in MAINS if view.has(name) and _can_ask(view, name)]
    if len(found) > 1:
        found = [name for name in found if name in view.mapped] or found
    if "instruction" in found:
        found = [name for name in found if name != "input"]  # which alpaca puts below it
    if len(found) > 1:
        found = [name for name in found if view.peek(name)] or found[:1]
    if len(found) > 1:
        names = " and ".join(f"`{view.key(name)}`" for name in found)
        flags = " or ".join(f"--columns {name}={view.key(name)}" for name in found)
        reason = f"{names} could each be the question: say which with {flags}"
        raise InvalidRecordError("E210", reason)
    return found[0] if found else None


def read_question(view: View, main: str) -> Question:
    """Read the question that stands under a name, with what belongs to it.

    Raises:
        InvalidRecordError: E2xx for values that are malformed, E403 for turns that ask nothing.
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


def read_tools(view: View) -> tuple[Message, ...]:
    """Read the functions that an assistant may call; they may be written as JSON.

    Raises:
        InvalidRecordError: E203 where they are no list of objects.
    """
    return _tools(view.take(TOOLS), view.key(TOOLS)) if view.has(TOOLS) else ()


def with_system(view: View, turns: Turns) -> Turns:
    """Put a system prompt that stands beside a chat before it, unless it begins the chat already.

    Raises:
        InvalidRecordError: E203 where it is no string, E206 where the chat has another.
    """
    for name in SYSTEM:
        system = view.optional_text(name)
        if not system or system == turns[0].get("content"):
            continue
        if turns[0]["role"] == "system":
            reason = f"{view.key(name)!r} and the chat's own system turn differ"
            raise InvalidRecordError("E206", reason)
        turns = ({"role": "system", "content": system}, *turns)
    return turns


def check_unread(view: View) -> None:
    """Refuse what would train without a part of its prompt.

    Raises:
        InvalidRecordError: E206, naming the part.
    """
    if view.lacks(_BEFORE):
        return
    for name in BEFORE:
        if view.peek(name) and not view.was_read(name) and name not in view.mapped:
            raise InvalidRecordError("E206", _unread(view, name))


def _unread(view: View, name: str) -> str:
    """Say what to do with a part of the prompt that is not read."""
    if name in _MEDIA:
        return (
            f"{view.key(name)!r} belongs before the answer, and only text is read: leave out such "
            "rows, or this key where the text is enough without it"
        )
    reason = f"{view.key(name)!r} belongs before the answer and is not read"
    if name == TOOLS:
        return f"{reason}: with tools, write prompt and answers as lists of messages"
    return f"{reason}: move it into the prompt"


def _can_ask(view: View, name: str) -> bool:
    if name == HISTORY:  # SHP's post; elsewhere, and as a list, turns before the question
        rest = [other for other in MAINS if other != HISTORY]
        return isinstance(view.peek(name), str) and not any(map(view.has, rest))
    return name != "context" or isinstance(view.peek(name), list)


def _openai(view: View, value: dict[str, Any]) -> Question:
    """Read the object that OpenAI puts the question into."""
    messages = value.get("messages")
    if not isinstance(messages, list):
        code = "E201" if "messages" not in value else "E203"
        raise InvalidRecordError(code, f"{view.key('input')!r} holds no list of 'messages'")
    view.leave("input", [key for key in value if key not in ("messages", TOOLS)])
    turns = conversations.prompt(messages, "input.messages")
    return Question("input", turns, _tools(value.get("tools"), "input.tools"))


def _history(view: View) -> Turns:
    """Read earlier turns: messages, or pairs of a question and its answer."""
    value = view.take(HISTORY) if view.has(HISTORY) else None
    if not value:
        return ()
    key = view.key(HISTORY)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return tuple(_weightless(read_messages(value, key)))
    if not isinstance(value, list) or not all(_is_exchange(item) for item in value):
        reason = f"{key!r} is no list of [question, answer]"
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
            raise InvalidRecordError("E203", f"{key!r} is a string and not JSON")
        value = spelled
    if not value or (isinstance(value, str) and not value.strip()):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InvalidRecordError("E203", f"{key!r} is no list of objects")
    return tuple(value)


def _user(text: Text) -> Message:
    return {"role": "user", "content": text}
