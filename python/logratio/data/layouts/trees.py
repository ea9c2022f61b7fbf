"""OASST's trees of messages: each question with ranked replies is a list."""

from collections.abc import Iterator
from typing import Any

from logratio.data.layouts.values import Part, Row, checked, is_number, take
from logratio.data.records import InvalidRecordError

Turns = tuple[dict[str, str], ...]


def looks_oasst(row: Row) -> bool:
    """Say whether a row is a tree: its prompt is an object with replies."""
    prompt = row.get("prompt")
    return isinstance(prompt, dict) and isinstance(prompt.get("replies"), list)


def oasst(row: Row) -> Iterator[Part]:
    """Make a ranked list of each user's message that has two ranked replies; rank 0 is the best.

    The prompt is the conversation from the tree's root. A reply without a rank, or a deleted one,
    is left out (R317) where it has siblings.

    Raises:
        InvalidRecordError: R316 where no message has two replies; E2xx for a malformed tree.
    """
    found = False
    waiting: list[tuple[Turns, dict[str, Any]]] = [((), take(row, "prompt", dict))]
    while waiting:
        before, message = waiting.pop()
        turns, replies = _spoken(before, message), _replies(message)
        if turns[-1]["role"] == "prompter" and len(replies) > 1:
            found = True
            yield from _list(turns, replies)
        waiting += [(turns, reply) for reply in reversed(replies)]
    if not found:
        raise InvalidRecordError("R316", "no message of the tree has two replies")


def _list(turns: Turns, replies: list[dict[str, Any]]) -> Iterator[Part]:
    ranked = []
    for reply in replies:
        if reply.get("deleted") or not is_number(reply.get("rank")):
            why = "was deleted" if reply.get("deleted") else "has no rank"
            yield InvalidRecordError("R317", f"the reply {reply.get('message_id')!s:.40} {why}")
        else:
            text = take(reply, "text", str, "a reply")
            ranked.append({"text": text, "rank": reply["rank"]})
    if len(ranked) > 1:
        yield {"prompt": [*turns], "completions": ranked}


def _spoken(before: Turns, message: dict[str, Any]) -> Turns:
    role, text = (take(message, key, str, "a message") for key in ("role", "text"))
    return (*before, {"role": role, "content": text})


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    replies = checked(message.get("replies") or [], list, "'replies' of a message")
    return [checked(reply, dict, "a reply") for reply in replies]
