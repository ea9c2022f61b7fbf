"""Check and normalize the messages of a chat and their tool calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from logratio.data.readers.json import json_type, parse_value
from logratio.data.records import InvalidRecordError, Message

_LONGEST_SHOWN = 60


def with_calls(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Normalize the tool calls of a message.

    Args:
        message: A message, with ``tool_calls`` (nested or flat), OpenAI's older
            ``function_call``, or neither.
        name: The name of the message in errors.

    Returns:
        The message with its calls under ``tool_calls``.

    Raises:
        InvalidRecordError: E203 for a malformed call, E210 if both keys differ, R312 for arguments
            that are not a JSON object.
    """
    rest = {k: v for k, v in message.items() if k not in ("tool_calls", "function_call")}
    calls = read_calls(message.get("tool_calls"), name)
    called = read_calls(message.get("function_call"), name)
    if calls and called and [call["function"] for call in calls] != [called[0]["function"]]:
        reason = f"'tool_calls' and 'function_call' of {name} differ: remove one of them"
        raise InvalidRecordError("E210", reason)
    if not calls and not called:
        return rest
    if rest.get("content") is None:  # many templates fail without it
        rest["content"] = ""
    return {**rest, "tool_calls": calls or called}


def read_calls(value: object, name: str) -> list[dict[str, Any]]:
    """Parse one call, a list of calls, or JSON of either; no calls from an empty value.

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
    for key in ("id", "type", "index"):  # a flat call holds them next to the function's name
        if not nested and function.get(key) is not None:
            rest[key] = function.pop(key)
    arguments = _arguments(function.get("arguments"), f"the call of {function['name']!r} in {name}")
    known = {k: v for k, v in function.items() if v is not None}
    return {"type": "function", **rest, "function": {**known, "arguments": arguments}}


def _arguments(value: object, name: str) -> dict[str, Any]:
    """Parse the arguments of a call; missing ones are an empty object."""
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
    reason = f"the arguments of {name} are not a JSON object: {_shown(value)} ({why})"
    return InvalidRecordError("R312", reason)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


ASSISTANT = "assistant"
Turns = tuple[Message, ...]

WEIGHTS = ("weight", "loss_weight", "train")
"""Keys for the weight of a message, in OpenAI's, LLaMA-Factory's and axolotl's formats."""

LARGEST = 1e4
"""Largest weight of a turn, and largest of a bad one."""

_SPEAKERS = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": ASSISTANT,
    "ai": ASSISTANT,
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
"""The role of each speaker, whose name may be in any letter case; the last two are Granite's."""

_CALLING = ("function_call", "tool_call")
"""Speakers whose content is a function call as JSON."""

_SHAREGPT = ("from", "value", "role", "content")

_ROLES = frozenset(_SPEAKERS.values())


def read_messages(value: Sequence[Any], name: str) -> Turns:
    """Normalize messages to ``{role, content}``, with text parts joined and null values dropped.

    A weight under one of `WEIGHTS` is kept as ``weight``.

    Raises:
        InvalidRecordError: E201 to E203 for malformed messages, E207 for content other than text,
            E208 for an invalid weight, E403 for an unknown role, R312 for a call whose arguments
            are not a JSON object.
    """
    return tuple(
        message if _is_plain(message) else _message(message, f"message {index + 1} of {name!r}")
        for index, message in enumerate(value)
    )


def bare(message: Message) -> Message:
    """Remove a message's weight, which templates must not see."""
    if "weight" not in message:
        return message
    return {key: value for key, value in message.items() if key != "weight"}


def _is_plain(message: Any) -> bool:
    """Return whether a message is already normalized, as most are."""
    if not isinstance(message, dict) or len(message) != 2:
        return False
    role = message.get("role")
    return isinstance(role, str) and role in _ROLES and isinstance(message.get("content"), str)


def _message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        is_a = json_type(message)
        raise InvalidRecordError("E203", f"{name} is {is_a}, not an object {{role, content}}")
    if "from" in message and "value" in message and "role" not in message:
        renamed = {"role": message["from"], "content": message["value"]}  # ShareGPT's keys
        message = {**renamed, **{k: v for k, v in message.items() if k not in _SHAREGPT}}
    if message.get("role") is not None:
        message = _with_role(message, name)
    if isinstance(message.get("content"), list):
        message = {**message, "content": _joined(message["content"], name)}
    if "tool_calls" in message or "function_call" in message:
        message = with_calls(message, name)
    _check(message, name)
    weight = _weight(message, name)
    # As transformers does: templates would write a null value as "None".
    plain = {k: v for k, v in message.items() if v is not None and k not in WEIGHTS}
    return plain if weight is None else {**plain, "weight": weight}


def _with_role(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Replace a speaker by its role; the content of a calling speaker becomes a tool call."""
    given = message["role"]
    speaker = given.strip().lower() if isinstance(given, str) else ""
    role = _SPEAKERS.get(speaker)
    if role is None and isinstance(given, str):
        known = ", ".join(_SPEAKERS)
        reason = f"{name} has the unknown role {given!r}: rename it to one of {known}"
        raise InvalidRecordError("E403", reason)
    if speaker not in _CALLING:
        return {**message, "role": role or given}
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
                "E207", f"{name} holds a part of type {kind!r}: only text is supported"
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


def _weight(message: dict[str, Any], name: str) -> float | None:
    """Return the weight of an assistant's message; None without one.

    With 0 it is not trained, and below 0 it is bad.
    """
    given = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    if not given:
        return None
    values = list(given.values())
    if not all(isinstance(value, int | float) and abs(value) <= LARGEST for value in values):
        shown = ", ".join(f"{key} {value!r}" for key, value in given.items())
        reason = (
            f"{name} has {shown}: the weight of a turn is a number from {-LARGEST:g} to "
            f"{LARGEST:g}: 1 if there is none, 0 if it is not trained, below 0 if it is bad"
        )
        raise InvalidRecordError("E208", reason)
    if len({float(value) for value in values}) > 1:
        raise InvalidRecordError("E208", f"{name} has weights that contradict each other")
    weight = float(values[0])
    if message["role"] == ASSISTANT:
        return weight
    if weight:
        reason = f"{name} has a weight of {weight:g}: only the assistant's turns are trained"
        raise InvalidRecordError("E208", reason)
    return None
