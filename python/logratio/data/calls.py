"""The tool calls of a message: read from any spelling into the one that chat templates know.

``{"type": "function", "function": {"name", "arguments"}}``, as transformers documents it: arguments
are an object, never a string of JSON, which templates would encode a second time. (A template that
joins arguments to strings is given JSON by `logratio.data.chat`.)
"""

from collections.abc import Mapping
from typing import Any

from logratio.data.containers import json_type, parse_value
from logratio.data.records import InvalidRecordError

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
