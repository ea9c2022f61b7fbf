"""Records to running text: what the model reads, and which of it counts."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from logratio.data.conversations import ended
from logratio.data.messages import Turns, bare
from logratio.data.records import Completion, InvalidRecordError, Message, PreferenceRecord, Text
from logratio.data.tokenization.chat_template import (
    MARK,
    ChatTemplate,
    ChatTemplateError,
    check_written,
    omissions,
)

_TOKENS = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\s+|\w+|.")
"""What a shortened prompt must not end inside of."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a completion's text, and whether its tokens count."""

    text: str
    counts: bool


@dataclass(frozen=True, slots=True)
class Script:
    """A record as text.

    Attributes:
        prompt: What the model reads before it answers.
        completions: The pieces of each completion, in order.
        notes: Codes of warnings: W512 to W515.
    """

    prompt: str
    completions: tuple[tuple[Piece, ...], ...]
    notes: tuple[str, ...] = ()

    def running_texts(self) -> Iterator[str]:
        """Yield the prompt, then each completion's beginnings: after every piece, all so far."""
        yield self.prompt
        for pieces in self.completions:
            text = self.prompt
            for piece in pieces:
                text += piece.text
                yield text


def plain_script(record: PreferenceRecord) -> Script:
    """Write a record of strings: texts follow each other as they are."""
    completions = tuple(_plain_pieces(completion) for completion in record.completions)
    return Script(str(record.prompt), completions)


def _plain_pieces(completion: Completion) -> tuple[Piece, ...]:
    answer = Piece(str(completion.answer), True)
    return (Piece(str(completion.context), False), answer) if completion.context else (answer,)


def chat_script(record: PreferenceRecord, template: ChatTemplate, eos: str | None) -> Script:
    """Write a record of messages as its chat template has it.

    Args:
        record: The record.
        template: Its template.
        eos: The end-of-text token as the template writes it; white space behind it is left out.

    Raises:
        InvalidRecordError: E403 where the template refuses the turns, E404 where an answer cannot
            be found in what the template writes, R311 where it writes nothing of an answer.
    """
    try:
        if any(isinstance(completion.answer, str) for completion in record.completions):
            return _begun_script(record, template)
        return _chat_script(record, template, eos)
    except ChatTemplateError as error:
        raise InvalidRecordError("E403", str(error)) from error


def _chat_script(record: PreferenceRecord, template: ChatTemplate, eos: str | None) -> Script:
    prompt = _turns(record.prompt)
    asked = template.render(prompt, tools=record.tools, add_generation_prompt=True)
    chats = [_Chat(template, eos, record, completion) for completion in record.completions]
    shared = _shared(asked, [chat.text for chat in chats], lambda: _neutral(record, template))
    for chat in chats:
        if asked and not shared:
            raise chat.not_found()
        check_written(chat, template, record.tools)
    if shared == asked or _holds(shared, template.render(prompt, tools=record.tools), asked):
        begins = len(prompt)  # the answer follows its prompt at once
    else:
        begins = None
    completions = tuple(_chat_pieces(chat, shared, begins) for chat in chats)
    notes = omissions(record, asked, chats, template)
    if any(ended(_turns(own.answer)) != _turns(own.answer) for own in record.completions):
        notes.append("W515")
    return Script(shared, completions, (*["W512"] * (shared != asked), *notes))


def _holds(shared: str, told: str, asked: str) -> bool:
    """Say whether a prompt holds all its turns, so that only the generation prompt was cut."""
    told = told.rstrip()
    return bool(shared) and asked.startswith(told) and len(told) <= len(shared)


def _begun_script(record: PreferenceRecord, template: ChatTemplate) -> Script:
    """Write strings behind turns: the assistant's next turn begins with them, as they are."""
    prompt = _turns(record.prompt)
    asked = template.render(prompt, tools=record.tools, add_generation_prompt=True)
    opening = _neutral(record, template).partition(MARK)[0]
    shared = _shared(asked, [opening], lambda: opening)
    written = opening[len(shared) :]
    completions = tuple(
        ((Piece(written, False),) if written else ()) + _plain_pieces(completion)
        for completion in record.completions
    )
    return Script(shared, completions, ("W512",) * (shared != asked))


def _turns(text: Text) -> Turns:
    return text if isinstance(text, tuple) else ()


def _neutral(record: PreferenceRecord, template: ChatTemplate) -> str:
    """Write a record's chat with an answer that no template looks into."""
    turns = (*_turns(record.prompt), {"role": "assistant", "content": MARK})
    return template.render(turns, tools=record.tools)


def _shared(asked: str, texts: Sequence[str], neutral: Callable[[], str]) -> str:
    """Return the prompt of a group; see the top of this file."""
    if all(text.startswith(asked) for text in texts):
        return asked
    with suppress(ChatTemplateError):  # it may look for what no neutral answer has
        texts = [*texts, neutral()]
    for text in texts:
        asked = common_start(asked, text)
    return asked


def common_start(one: str, other: str) -> str:
    """Return the longest common beginning that ends inside no token of either text."""
    if other.startswith(one):
        return one
    parted = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    length = min(len(one), len(other)) if parted is None else parted
    ends = _ends(one, length) & _ends(other, length)
    return one[: max(ends, default=0)]


def _ends(text: str, length: int) -> set[int]:
    """Return where tokens of a text end, up to a length."""
    ends = set()
    for token in _TOKENS.finditer(text):
        if token.end() > length:
            break
        ends.add(token.end())
    return ends


def _chat_pieces(chat: "_Chat", shared: str, begins: int | None) -> tuple[Piece, ...]:
    """Cut a completion out of what follows its prompt; turn ``begins`` starts behind it."""
    position = len(shared)
    pieces = []
    for index in chat.answers:
        start = position if index == begins else chat.start_of(index)
        if start < position:
            raise chat.not_found()
        end = chat.end_of(index, start)
        if end < start:
            raise chat.not_found()
        if start > position:
            pieces.append(Piece(chat.text[position:start], False))
        pieces.append(Piece(chat.text[start:end], True))
        position = end
    return tuple(pieces)


class _Chat:
    """A whole chat as rendered, and the place of each turn in it.

    Attributes:
        completion: The completion that ends it.
        turns: Every turn, as the template sees it.
        text: What the template writes.
        answers: The numbers of the turns that count.
    """

    def __init__(
        self,
        template: ChatTemplate,
        eos: str | None,
        record: PreferenceRecord,
        completion: Completion,
    ) -> None:
        before = (*_turns(record.prompt), *_turns(completion.context))
        answer = ended(_turns(completion.answer))
        self.completion = completion
        self._template = template
        self._tools = record.tools
        self._eos = eos or "\0"  # which no template writes
        self.turns: Turns = (*before, *map(bare, answer))
        self.text = self._render(self.turns)
        self.answers = [
            len(before) + index
            for index, turn in enumerate(answer)
            if turn["role"] == "assistant" and turn.get("weight") != 0
        ]

    def _render(self, turns: Turns, *, ask: bool = False) -> str:
        return self._template.render(turns, tools=self._tools, add_generation_prompt=ask)

    def start_of(self, index: int) -> int:
        """Find where the assistant begins to speak in a turn, behind what asks it to."""
        asked = self._render(self.turns[:index], ask=True)
        if self.text.startswith(asked):
            return len(asked)
        # What is before the turn may be written differently later on, and so may the generation
        # prompt: compare what follows the content of the turn before it.
        _, mark, asking = self._render(self._marked(index - 1)[:index], ask=True).rpartition(MARK)
        _, same, behind = self._render(self._marked(index - 1)).rpartition(MARK)
        if mark and same and self.text.endswith(behind):
            return len(self.text) - len(behind) + len(common_start(asking, behind))
        return self._around(index)[0]

    def end_of(self, index: int, start: int) -> int:
        """Find where a turn ends: with its end-of-text token, without white space behind it."""
        is_last = index == len(self.turns) - 1
        told = self.text if is_last else self._render(self.turns[: index + 1])
        if self.text.startswith(told):
            trimmed = told.rstrip()
            return len(trimmed) if trimmed.endswith(self._eos) else len(told)
        return self._end_before_next(index, start)

    def _end_before_next(self, index: int, start: int) -> int:
        """Find where a turn ends that is written differently once another follows."""
        closing = self._closing(index)
        if not self.turns[index].get("tool_calls"):
            end = self._around(index)[1]
            return end + len(common_start(closing, self.text[end:]).rstrip())
        later = range(index + 1, len(self.turns))
        texts = (self._render(self._marked(other)) for other in later)
        behind = next((text.rpartition(MARK)[2] for text in texts if MARK in text), None)
        mark = next(iter(_TOKENS.findall(closing)), None)
        if mark and behind is not None and self.text.endswith(behind):
            end = self.text.rfind(mark, start, len(self.text) - len(behind))
            if end >= 0:
                return end + len(common_start(closing, self.text[end:]).rstrip())
        raise self.not_found()

    def _closing(self, index: int) -> str:
        """Return what the template writes behind the content of an assistant's last turn."""
        turns = (*self.turns[:index], {"role": "assistant", "content": MARK})
        return self._render(turns).rpartition(MARK)[2].strip()

    def _around(self, index: int) -> tuple[int, int]:
        """Find where a turn's content starts and ends by writing a mark in its place."""
        before, mark, behind = self._render(self._marked(index)).partition(MARK)
        end = len(self.text) - len(behind)
        if not (mark and self.text.startswith(before) and self.text.endswith(behind)):
            raise self.not_found()
        return len(before), end

    def _marked(self, index: int) -> Turns:
        turns = list(self.turns)
        turns[index] = {**turns[index], "content": MARK}
        return tuple(turns)

    def not_found(self) -> InvalidRecordError:
        """Make the error for an answer that the template hides."""
        reason = "the chat template writes the prompt differently once the answer follows"
        return InvalidRecordError("E404", f"{reason}, and the answer cannot be found in it")


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
    if not _holds_in_order(text, _SAID):
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
    if not _holds_in_order(text, (_SYSTEM, *_SAID)):
        return ""
    header = _header(text.partition(_SYSTEM)[0], "", special)
    return header.splitlines()[0] if header else ""


def _rendered(template: ChatTemplate, turns: Sequence[Message], *, ask: bool = False) -> str:
    with suppress(ChatTemplateError):
        return template.render(turns, add_generation_prompt=ask)
    return ""


def _holds_in_order(text: str, marks: Sequence[str]) -> bool:
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
