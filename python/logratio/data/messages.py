"""Messages of a chat and their tool calls: checked, and brought to one spelling."""

from collections.abc import Mapping, Sequence
from typing import Any

from logratio.data.readers.json import json_type, parse_value
from logratio.data.records import InvalidRecordError, Message

_LONGEST_SHOWN = 60


def with_calls(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Read the calls of a message, if it has any.

    Args:
        message: May hold ``tool_calls`` (nested or flat) or OpenAI's older ``function_call``.
        name: What errors call the message.

    Returns:
        The message with its calls under ``tool_calls``.

    Raises:
        InvalidRecordError: E203 for what is no call, E210 for two keys that differ, R312 for
            arguments that are no JSON object.
    """
    rest = {k: v for k, v in message.items() if k not in ("tool_calls", "function_call")}
    calls = read_calls(message.get("tool_calls"), name)
    called = read_calls(message.get("function_call"), name)
    if calls and called and [call["function"] for call in calls] != [called[0]["function"]]:
        reason = f"'tool_calls' and 'function_call' of {name} differ: leave one of them out"
        raise InvalidRecordError("E210", reason)
    if not calls and not called:
        return rest
    if rest.get("content") is None:  # many templates fail without it, and none writes it
        rest["content"] = ""
    return {**rest, "tool_calls": calls or called}


def read_calls(value: object, name: str) -> list[dict[str, Any]]:
    """Read calls: one, or a list of them, or JSON of either; none from nothing.

    Raises:
        InvalidRecordError: As `with_calls` does.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = parse_value(value)
        except (ValueError, InvalidRecordError):
            reason = f"the function call of {name} is not JSON: {_shown(value)}"
            raise InvalidRecordError("E203", reason) from None
    if not value or (isinstance(value, str) and not value.strip()):
        return []
    return [_call(call, name) for call in (value if isinstance(value, list) else [value])]


def _call(call: object, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        reason = (
            f"a function call of {name} is {json_type(call)}, not an object {{name, arguments}}"
        )
        raise InvalidRecordError("E203", reason)
    nested = isinstance(call.get("function"), Mapping)
    function = dict(call["function"] if nested else call)
    if not isinstance(function.get("name"), str):
        raise InvalidRecordError("E203", f"a function call of {name} has no 'name'")
    rest = {k: v for k, v in call.items() if v is not None} if nested else {}
    for key in ("id", "type", "index"):  # of a flat call: they belong to the call
        if not nested and function.get(key) is not None:
            rest[key] = function.pop(key)
    arguments = _arguments(function.get("arguments"), f"the call of {function['name']!r} in {name}")
    known = {k: v for k, v in function.items() if v is not None}
    return {"type": "function", **rest, "function": {**known, "arguments": arguments}}


def _arguments(value: object, name: str) -> dict[str, Any]:
    """Read what a function is called with; nothing at all is an empty object."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    read = value
    if isinstance(value, str):
        try:
            read = parse_value(value)
        except (ValueError, InvalidRecordError) as error:
            raise _no_object(name, value, str(error)) from None
    if not isinstance(read, dict):
        raise _no_object(name, value, f"it is {json_type(read)}")
    return read


def _no_object(name: str, value: object, why: str) -> InvalidRecordError:
    reason = f"the arguments of {name} are no JSON object: {_shown(value)} ({why})"
    return InvalidRecordError("R312", reason)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


ASSISTANT = "assistant"
Turns = tuple[Message, ...]

WEIGHTS = ("weight", "loss_weight", "train")
"""Keys by which a message says whether its words count, here as OpenAI, LLaMA-Factory, axolotl."""

_SPEAKERS = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "chatbot": ASSISTANT,
    "model": ASSISTANT,
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": ASSISTANT,
    "tool_call": ASSISTANT,
    "document": "document",
    "control": "control",
}
"""Who speaks, in any letter case, and the role that templates know; the last two are Granite's."""

_CALLING = ("function_call", "tool_call")
"""Speakers whose words are a call of a function, as JSON."""

_SHAREGPT = ("from", "value", "role", "content")

_ROLES = frozenset(_SPEAKERS.values())


def read_messages(value: Sequence[Any], name: str) -> Turns:
    """Read messages as ``{role, content}``, with parts of text joined and null values left out.

    A ``weight`` of 0 or 1 stays where one of `WEIGHTS` was given.

    Raises:
        InvalidRecordError: E201 to E203 for malformed messages, E207 for content that is no text,
            E208 for a weight that cannot be, E403 for a role that is not known, R312 for a call
            whose arguments are no JSON object.
    """
    return tuple(
        message if _is_plain(message) else _message(message, f"message {index + 1} of {name!r}")
        for index, message in enumerate(value)
    )


def bare(message: Message) -> Message:
    """Leave out a message's weight, which no template is to see."""
    if "weight" not in message:
        return message
    return {key: value for key, value in message.items() if key != "weight"}


def _is_plain(message: Any) -> bool:
    """Say whether nothing has to be read into a message: most are like this."""
    if not isinstance(message, dict) or len(message) != 2:
        return False
    role = message.get("role")
    return isinstance(role, str) and role in _ROLES and isinstance(message.get("content"), str)


def _message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        is_a = json_type(message)
        raise InvalidRecordError("E203", f"{name} is {is_a}, not an object {{role, content}}")
    if "from" in message and "value" in message and "role" not in message:
        said = {"role": message["from"], "content": message["value"]}  # ShareGPT's spelling
        message = {**said, **{k: v for k, v in message.items() if k not in _SHAREGPT}}
    if message.get("role") is not None:
        message = _with_role(message, name)
    if isinstance(message.get("content"), list):
        message = {**message, "content": _joined(message["content"], name)}
    if "tool_calls" in message or "function_call" in message:
        message = with_calls(message, name)
    _check(message, name)
    weight = _weight(message, name)
    # As transformers does: an absent key renders well where a null one would read "None".
    plain = {k: v for k, v in message.items() if v is not None and k not in WEIGHTS}
    return plain if weight is None else {**plain, "weight": weight}


def _with_role(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Give a message the role that templates know; the words of a call become the call."""
    said = message["role"]
    speaker = said.strip().lower() if isinstance(said, str) else ""
    role = _SPEAKERS.get(speaker)
    if role is None and isinstance(said, str):
        known = ", ".join(_SPEAKERS)
        reason = f"{name} has the unknown role {said!r}: rename it to one of {known}"
        raise InvalidRecordError("E403", reason)
    if speaker not in _CALLING:
        return {**message, "role": role or said}
    calls = read_calls(message.get("content"), name)
    if not calls:
        raise InvalidRecordError("E203", f"the function call of {name} is empty")
    return {**message, "role": role, "content": "", "tool_calls": calls}


def _joined(parts: list[Any], name: str) -> str:
    """Join the parts of a message's content, all of which must be text."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping):
            is_a = json_type(part)
            raise InvalidRecordError("E203", f"a content part of {name} is {is_a}, not an object")
        kind = part.get("type", "text")
        if kind != "text":
            raise InvalidRecordError(
                "E207", f"{name} holds a part of type {kind!r}: only text is read"
            )
        filled = [part[key] for key in ("text", "value") if part.get(key) is not None]
        if len(filled) != 1 or not isinstance(filled[0], str):
            reason = f"a text part of {name} has no string under 'text' or 'value'"
            raise InvalidRecordError("E203", reason)
        texts.append(filled[0])
    return "".join(texts)


def _check(message: dict[str, Any], name: str) -> None:
    for key in ("role", "content"):
        if key not in message:
            raise InvalidRecordError("E201", f"{name} has no {key!r}")
        if message[key] is None:
            raise InvalidRecordError("E202", f"the {key} of {name} is null")
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            is_a = json_type(message[key])
            raise InvalidRecordError("E203", f"the {key} of {name} is {is_a}, not a string")


def _weight(message: dict[str, Any], name: str) -> int | None:
    """Say whether a message counts (1) or not (0); None where it does not say."""
    given = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    if not given:
        return None
    values = list(given.values())
    if not all(isinstance(value, int | float) and value in (0, 1) for value in values):
        shown = ", ".join(f"{key} {value!r}" for key, value in given.items())
        reason = f"{name} has {shown}: a turn counts (1) or does not (0)"
        raise InvalidRecordError("E208", reason)
    if len({int(value) for value in values}) > 1:
        raise InvalidRecordError("E208", f"{name} has weights that contradict each other")
    weight = int(values[0])
    if message["role"] == ASSISTANT:
        return weight
    if weight:
        reason = f"{name} has a weight of 1: only the assistant's turns can count"
        raise InvalidRecordError("E208", reason)
    return None
