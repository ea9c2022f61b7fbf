"""Prompts that a chat template has already written: found by the template's own role headers.

A message that holds `<|im_start|>user` would become a turn inside a turn, with a second beginning
of text. Headers with markup (`<…>`, `[…]`) are looked for anywhere in a message, and an end-of-turn
mark at its end only, since `</s>` is legal HTML. Headers of plain words (`USER:`) are common in
quoted dialogues: a text counts as rendered where it holds the user's before the assistant's and
begins with the one or ends with the other.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from logratio.data.chat import ChatTemplate, ChatTemplateError
from logratio.data.records import InvalidRecordError, Message
from logratio.data.scripts import common_start

_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_ROLES = ("user", "assistant", "user", "assistant")
_SYSTEM, *_SAID = (f"\ue000{number}\ue001" for number in range(1 + len(_ROLES)))

AS_TEXT = (
    "give text that was already rendered as a plain `prompt` (as with --columns prompt=input) and "
    "plain answers"
)
UNWRAPPED = "read text that was already rendered with --text in place of --chat"
"""What to do about a rendered text: where messages are wanted, and where text is wrapped."""


@dataclass(frozen=True, slots=True)
class Headers:
    """What a template writes before the words of each role, and after an answer; "" if unknown."""

    system: str
    user: str
    assistant: str
    end: str


class Markers:
    """Looks for what a template writes around turns, in texts that are still to be written.

    Attributes:
        headers: The markers.
    """

    def __init__(self, template: ChatTemplate, special: Iterable[str]) -> None:
        """Render a chat of marks once.

        Args:
            template: The template.
            special: The tokens that begin and end texts, which are no part of a header.
        """
        self.headers = found = _headers(template, tuple(filter(None, special)))
        roles = {found.system, found.user, found.assistant}
        marked = sorted(filter(_MARKUP.search, roles), key=len, reverse=True)
        patterns = list(map(re.escape, marked))
        end = _MARKUP.match(found.end)
        if end:
            patterns.append(rf"{re.escape(end[0])}\s*\Z")
        self._pattern = re.compile("|".join(patterns)) if patterns else None
        self._words = None
        if found.user and found.assistant and not (_MARKUP.search(found.user + found.assistant)):
            self._words = found.user, found.assistant

    def find(self, text: str) -> str | None:
        """Return a marker that a text holds, or None."""
        found = self._pattern.search(text) if self._pattern else None
        if found:
            return found[0].strip()
        if self._words and _is_dialogue(text.strip(), *self._words):
            return self._words[0]
        return None

    def check(self, texts: Iterable[str], advice: str = AS_TEXT) -> None:
        """Refuse texts that were already rendered, with what to do.

        Raises:
            InvalidRecordError: E405.
        """
        for text in texts:
            marker = self.find(text)
            if marker is not None:
                raise InvalidRecordError(
                    "E405",
                    f"a message holds {marker!r}, which the chat template writes itself: {advice}, "
                    "or remove the markers from it",
                )


def _is_dialogue(text: str, user: str, assistant: str) -> bool:
    first = text.find(user)
    is_both = first >= 0 and text.find(assistant, first + len(user)) >= 0
    return is_both and (text.startswith(user) or text.endswith(assistant))


def _headers(template: ChatTemplate, special: Sequence[str]) -> Headers:
    turns = [{"role": role, "content": mark} for role, mark in zip(_ROLES, _SAID, strict=True)]
    text = _rendered(template, turns)
    if not _holds(text, _SAID):
        return Headers("", "", "", "")
    _, first, middle, last, end = re.split("|".join(_SAID), text)
    asked = _rendered(template, turns[:3], ask=True).rpartition(_SAID[2])[2]
    shared = common_start(common_start(first, last), asked) if asked else common_start(first, last)
    return Headers(
        _system(template, turns, special),
        _header(middle, end, special),
        _header(shared.partition("<think>")[0], end, special),
        end.strip(),
    )


def _system(template: ChatTemplate, turns: Sequence[Message], special: Sequence[str]) -> str:
    """Find the first line of what stands before a system message; "" if it is no turn."""
    text = _rendered(template, [{"role": "system", "content": _SYSTEM}, *turns])
    if not _holds(text, (_SYSTEM, *_SAID)):
        return ""
    header = _header(text.partition(_SYSTEM)[0], "", special)
    return header.splitlines()[0] if header else ""


def _rendered(template: ChatTemplate, turns: Sequence[Message], *, ask: bool = False) -> str:
    with suppress(ChatTemplateError):
        return template.render(turns, add_generation_prompt=ask)
    return ""


def _holds(text: str, marks: Sequence[str]) -> bool:
    """Say whether a text holds each mark once, in this order."""
    places = [text.find(mark) for mark in marks]
    is_once = all(text.count(mark) == 1 for mark in marks)
    return is_once and places == sorted(places)


def _header(between: str, end: str, special: Sequence[str]) -> str:
    """Return what follows the end of a turn, without tokens that begin and end texts."""
    header = between[len(common_start(between, end)) :].strip()
    while header.startswith(tuple(special)):
        token = next(token for token in special if header.startswith(token))
        header = header.removeprefix(token).strip()
    return header
