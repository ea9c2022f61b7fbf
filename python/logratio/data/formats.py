"""Rows to records: which shape a row has, told by its keys and the types of its values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logratio.data import conversations, transcripts
from logratio.data.containers import Row, json_type
from logratio.data.records import (
    CHOSEN,
    DEMONSTRATION,
    REJECTED,
    Completion,
    InvalidRecordError,
    PreferenceRecord,
    Source,
    Text,
)

KNOWN_SHAPES = (
    "known shapes: `prompt`, `chosen`, `rejected` as three strings; the same as lists of messages "
    "{role, content}; `chosen` and `rejected` alone, as full lists of messages or as transcripts "
    "with '\\n\\nHuman:' and '\\n\\nAssistant:'; for demonstrations also `prompt` and "
    "`completion`, or `messages`"
)

_UNREAD_CONTEXT = ("system", "history", "tools", "images", "initial_reason_steps")
"""Keys of other shapes, whose values the model has to see before it answers."""

_LABELS = ("label", "labels")  # of unpaired feedback: a bad answer must not be imitated


@dataclass(frozen=True, slots=True)
class Decoded:
    """A row as a record.

    Attributes:
        record: What it says.
        format: The name of its shape.
        extra_keys: Keys that were not read.
    """

    record: PreferenceRecord
    format: str
    extra_keys: tuple[str, ...]


def decode_row(row: Row, source: Source, *, demonstrations: bool = False) -> Decoded:
    """Read a row of any known shape.

    Args:
        row: The JSON object of one line.
        source: Its file and line.
        demonstrations: Make records of one completion to imitate; of a pair, the chosen one.

    Raises:
        InvalidRecordError: E2xx where the shape is unknown or broken, E403 where roles do not fit,
            R301 and R302 where the content is of no use.
    """
    _check_context(row)
    if "chosen" in row or "rejected" in row:
        format_name, keys, prompt, completions = _pair(row)
        if demonstrations:
            chosen = completions[0]
            completions = (Completion(DEMONSTRATION, chosen.answer, chosen.context),)
    elif demonstrations:
        format_name, keys, prompt, completions = _demonstration(row)
    else:
        raise InvalidRecordError("E206", _no_pair(row))
    for completion in completions:
        _check_not_empty(completion)
    if len(completions) == 2:
        _check_different(*completions)
    extra = tuple(key for key in row if key not in keys)
    return Decoded(PreferenceRecord(prompt, completions, source), format_name, extra)


_Parts = tuple[str, Sequence[str], Text, tuple[Completion, ...]]


def _pair(row: Row) -> _Parts:
    if "prompt" not in row:
        return _implicit_pair(row)
    keys = ("prompt", "chosen", "rejected")
    kinds = [_kind(row, key) for key in keys]
    if kinds == ["text"] * 3:
        chosen, rejected = Completion(CHOSEN, row["chosen"]), Completion(REJECTED, row["rejected"])
        return "prompt/chosen/rejected strings", keys, row["prompt"], (chosen, rejected)
    if kinds == ["messages"] * 3:
        prompt = conversations.prompt(row["prompt"], "prompt")
        chosen = Completion(CHOSEN, conversations.answer(row["chosen"], CHOSEN), ())
        rejected = Completion(REJECTED, conversations.answer(row["rejected"], REJECTED), ())
        return "prompt/chosen/rejected messages", keys, prompt, (chosen, rejected)
    if kinds == ["text", "messages", "messages"]:
        raise InvalidRecordError(
            "E206",
            "`prompt` is a string and `chosen`, `rejected` are messages (UltraFeedback?): if they "
            "hold the whole chat, leave `prompt` out; if only the answer, make `prompt` messages",
        )
    raise InvalidRecordError("E206", f"`prompt`, `chosen`, `rejected` are {', '.join(kinds)}")


def _implicit_pair(row: Row) -> _Parts:
    """Read a pair whose two sides both hold the prompt."""
    keys = ("chosen", "rejected")
    kinds = [_kind(row, key) for key in keys]
    if kinds == ["messages", "messages"]:
        turns, own = conversations.split({key: row[key] for key in keys})
        return "chosen/rejected messages", keys, turns, _sides(own)
    if kinds != ["text", "text"]:
        raise InvalidRecordError("E206", f"`chosen` is {kinds[0]} and `rejected` {kinds[1]}")
    if not any(transcripts.is_transcript(row[key]) for key in keys):
        raise InvalidRecordError("E201", "the key 'prompt' is missing")
    text, parts = transcripts.split({key: row[key] for key in keys})
    return "chosen/rejected transcripts", keys, text, _sides(parts)


def _sides(parts: Sequence[tuple[Text, Text]]) -> tuple[Completion, ...]:
    return tuple(
        Completion(role, answer, context)
        for role, (context, answer) in zip((CHOSEN, REJECTED), parts, strict=True)
    )


def _demonstration(row: Row) -> _Parts:
    if any(label in row for label in _LABELS):
        raise InvalidRecordError("E206", "a labelled row is no demonstration")
    if "messages" in row and "completion" not in row:
        if _kind(row, "messages") != "messages":
            raise InvalidRecordError("E203", "`messages` is a string, not a list of messages")
        turns, answer = conversations.split_demonstration(row["messages"])
        return "messages", ("messages",), turns, (Completion(DEMONSTRATION, answer, ()),)
    if "completion" not in row:
        raise InvalidRecordError("E206", f"keys {_some(row)}")
    keys = ("prompt", "completion")
    kinds = [_kind(row, key) for key in keys]
    if kinds == ["text", "text"]:
        completion = Completion(DEMONSTRATION, row["completion"])
        return "prompt/completion strings", keys, row["prompt"], (completion,)
    if kinds == ["messages", "messages"]:
        prompt = conversations.prompt(row["prompt"], "prompt")
        answer = conversations.answer(row["completion"], "completion")
        return "prompt/completion messages", keys, prompt, (Completion(DEMONSTRATION, answer, ()),)
    raise InvalidRecordError("E206", f"`prompt` is {kinds[0]} and `completion` {kinds[1]}")


def _no_pair(row: Row) -> str:
    if "messages" in row or "completion" in row:
        return "a row without `chosen` and `rejected` is no pair"
    return f"keys {_some(row)}"


def _some(row: Row) -> str:
    """Name a row's first keys."""
    names = ", ".join(f"`{key:.40}`" for key in list(row)[:8])
    return names + (", …" if len(row) > 8 else "") if row else "none"


def _kind(row: Row, key: str) -> str:
    """Tell text from messages."""
    if key not in row:
        raise InvalidRecordError("E201", f"the key {key!r} is missing")
    value: Any = row[key]
    if value is None:
        raise InvalidRecordError("E202", f"{key!r} is null")
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        raise InvalidRecordError(
            "E203", f"{key!r} is {json_type(value)}, not a string or a list of messages"
        )
    return "messages"


def _check_context(row: Row) -> None:
    """Refuse what would train without a part of its prompt."""
    for key in _UNREAD_CONTEXT:
        if row.get(key):
            reason = f"{key!r} belongs before the answer and is not read: move it into the prompt"
            raise InvalidRecordError("E206", reason)


def _check_not_empty(completion: Completion) -> None:
    answer = completion.answer
    words = answer if isinstance(answer, str) else conversations.words(answer)
    if not words.strip():
        raise InvalidRecordError("R301", f"the {completion.role} completion is empty")


def _check_different(chosen: Completion, rejected: Completion) -> None:
    if (chosen.context, chosen.answer) == (rejected.context, rejected.answer):
        raise InvalidRecordError("R302", "the chosen and the rejected completion are identical")
