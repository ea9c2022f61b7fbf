"""Render records as text, with the trained parts of each completion."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from logratio.data.conversations import counts, ended
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
"""Units of text; a shortened prompt must not end inside one."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a completion's text, and the weight of its tokens' log-probs; 0: not trained."""

    text: str
    weight: float

    @property
    def counts(self) -> bool:
        """Whether its tokens are trained."""
        return self.weight != 0


@dataclass(frozen=True, slots=True)
class Script:
    """A record as text.

    Attributes:
        prompt: The text before the answers.
        completions: The pieces of each completion, in order.
        notes: Codes of warnings: W512 to W515.
    """

    prompt: str
    completions: tuple[tuple[Piece, ...], ...]
    notes: tuple[str, ...] = ()

    def running_texts(self) -> Iterator[str]:
        """Yield the prompt, then for each piece of each completion the text up to its end."""
        yield self.prompt
        for pieces in self.completions:
            text = self.prompt
            for piece in pieces:
                text += piece.text
                yield text


def plain_script(record: PreferenceRecord) -> Script:
    """Concatenate the strings of a record."""
    completions = tuple(_plain_pieces(completion) for completion in record.completions)
    return Script(str(record.prompt), completions)


def _plain_pieces(completion: Completion) -> tuple[Piece, ...]:
    answer = Piece(str(completion.answer), 1)
    return (Piece(str(completion.context), 0), answer) if completion.context else (answer,)


def chat_script(record: PreferenceRecord, template: ChatTemplate, eos: str | None) -> Script:
    """Render a record of messages with a chat template.

    Args:
        record: The record.
        template: The template.
        eos: The text of the end-of-text token; white space after it is left out.

    Raises:
        InvalidRecordError: E403 if the template refuses the turns, E404 if an answer cannot be
            located in the rendered text, R311 if the template writes nothing of an answer.
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
        begins = len(prompt)  # the answer directly follows its prompt
    else:
        begins = None
    completions = tuple(_chat_pieces(chat, shared, begins) for chat in chats)
    notes = omissions(record, asked, chats, template)
    if any(ended(_turns(own.answer)) != _turns(own.answer) for own in record.completions):
        notes.append("W515")
    return Script(shared, completions, (*["W512"] * (shared != asked), *notes))


def _holds(shared: str, rendered: str, asked: str) -> bool:
    """Return whether a prompt contains all its turns: only the generation prompt was cut."""
    rendered = rendered.rstrip()
    return bool(shared) and asked.startswith(rendered) and len(rendered) <= len(shared)


def _begun_script(record: PreferenceRecord, template: ChatTemplate) -> Script:
    """Render turns followed by strings, with which the assistant's next turn begins."""
    prompt = _turns(record.prompt)
    asked = template.render(prompt, tools=record.tools, add_generation_prompt=True)
    opening = _neutral(record, template).partition(MARK)[0]
    shared = _shared(asked, [opening], lambda: opening)
    written = opening[len(shared) :]
    completions = tuple(
        ((Piece(written, 0),) if written else ()) + _plain_pieces(completion)
        for completion in record.completions
    )
    return Script(shared, completions, ("W512",) * (shared != asked))


def _turns(text: Text) -> Turns:
    return text if isinstance(text, tuple) else ()


def _neutral(record: PreferenceRecord, template: ChatTemplate) -> str:
    """Render a record's chat with `MARK` as the answer."""
    turns = (*_turns(record.prompt), {"role": "assistant", "content": MARK})
    return template.render(turns, tools=record.tools)


def _shared(asked: str, texts: Sequence[str], neutral: Callable[[], str]) -> str:
    """Return the longest prompt text with which all chats of a group begin."""
    if all(text.startswith(asked) for text in texts):
        return asked
    with suppress(ChatTemplateError):  # it may require more than a neutral answer has
        texts = [*texts, neutral()]
    for text in texts:
        asked = common_start(asked, text)
    return asked


def common_start(one: str, other: str) -> str:
    """Return the longest common prefix that does not end inside a token of either text."""
    if other.startswith(one):
        return one
    parted = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    length = min(len(one), len(other)) if parted is None else parted
    ends = _ends(one, length) & _ends(other, length)
    return one[: max(ends, default=0)]


def _ends(text: str, length: int) -> set[int]:
    """Return the ends of the tokens of a text, up to a length."""
    ends = set()
    for token in _TOKENS.finditer(text):
        if token.end() > length:
            break
        ends.add(token.end())
    return ends


def _chat_pieces(chat: "_Chat", shared: str, begins: int | None) -> tuple[Piece, ...]:
    """Cut a completion from the text after its prompt; turn ``begins`` starts right after it."""
    position = len(shared)
    pieces = []
    for index, weight in zip(chat.answers, chat.weights, strict=True):
        start = position if index == begins else chat.start_of(index)
        if start < position:
            raise chat.not_found()
        end = chat.end_of(index, start)
        if end < start:
            raise chat.not_found()
        if start > position:
            pieces.append(Piece(chat.text[position:start], 0))
        pieces.append(Piece(chat.text[start:end], weight))
        position = end
    return tuple(pieces)


class _Chat:
    """A rendered chat; locates each turn in its text.

    Attributes:
        completion: The completion that ends it.
        turns: All turns, as passed to the template.
        text: The rendered text.
        answers: The indices of the trained turns.
        weights: Their weights.
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
        self._eos = eos or "\0"  # no template writes NUL
        self.turns: Turns = (*before, *map(bare, answer))
        self.text = self._render(self.turns)
        places = [index for index, turn in enumerate(answer) if counts(turn)]
        self.answers = [len(before) + index for index in places]
        self.weights: list[float] = [answer[index].get("weight", 1) for index in places]

    def _render(self, turns: Turns, *, ask: bool = False) -> str:
        return self._template.render(turns, tools=self._tools, add_generation_prompt=ask)

    def start_of(self, index: int) -> int:
        """Return where the assistant's words begin in a turn, after the generation prompt."""
        asked = self._render(self.turns[:index], ask=True)
        if self.text.startswith(asked):
            return len(asked)
        # A template may render the earlier turns and the generation prompt differently once more
        # turns follow: compare the text after the content of the previous turn.
        _, mark, asking = self._render(self._marked(index - 1)[:index], ask=True).rpartition(MARK)
        _, same, behind = self._render(self._marked(index - 1)).rpartition(MARK)
        if mark and same and self.text.endswith(behind):
            return len(self.text) - len(behind) + len(common_start(asking, behind))
        return self._around(index)[0]

    def end_of(self, index: int, start: int) -> int:
        """Return where a turn ends: after its end-of-text token, without white space."""
        is_last = index == len(self.turns) - 1
        rendered = self.text if is_last else self._render(self.turns[: index + 1])
        if self.text.startswith(rendered):
            trimmed = rendered.rstrip()
            return len(trimmed) if trimmed.endswith(self._eos) else len(rendered)
        return self._end_before_next(index, start)

    def _end_before_next(self, index: int, start: int) -> int:
        """Return where a turn ends that is rendered differently once another follows."""
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
        """Return the text that the template writes after the content of a final assistant turn."""
        turns = (*self.turns[:index], {"role": "assistant", "content": MARK})
        return self._render(turns).rpartition(MARK)[2].strip()

    def _around(self, index: int) -> tuple[int, int]:
        """Return where a turn's content starts and ends, by rendering a mark in its place."""
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
        """Build the error for an answer that cannot be located."""
        reason = "the chat template writes the prompt differently once the answer follows"
        return InvalidRecordError("E404", f"{reason}, so the answer cannot be located")


_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_ROLES = ("user", "assistant", "user", "assistant")
_SYSTEM, *_CONTENTS = (f"\ue000{number}\ue001" for number in range(1 + len(_ROLES)))

AS_TEXT = (
    "pass text that was already rendered as a plain `prompt` (as with --columns prompt=input) and "
    "plain answers"
)
UNWRAPPED = "read text that was already rendered with --text in place of --chat"
"""Advice about rendered text: in a row of messages, and in text that ``--chat`` wraps."""


@dataclass(frozen=True, slots=True)
class Headers:
    """The text that a template writes before each role, and after an answer; "" if unknown."""

    system: str
    user: str
    assistant: str
    end: str


class Markers:
    """Finds the markup of a chat template in texts that have not been rendered.

    Attributes:
        headers: The markup.
    """

    def __init__(self, template: ChatTemplate, special: Iterable[str]) -> None:
        """Extract the markup by rendering a chat of marks.

        Args:
            template: The template.
            special: The BOS and EOS tokens, which are not part of a header.
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
        """Return a marker that a text contains, or None."""
        found = self._pattern.search(text) if self._pattern else None
        if found:
            return found[0].strip()
        if self._words and _is_dialogue(text.strip(), *self._words):
            return self._words[0]
        return None

    def check(self, texts: Iterable[str], advice: str = AS_TEXT) -> None:
        """Refuse texts that were already rendered, and name the remedy.

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
    turns = [{"role": role, "content": mark} for role, mark in zip(_ROLES, _CONTENTS, strict=True)]
    text = _rendered(template, turns)
    if not _holds_in_order(text, _CONTENTS):
        return Headers("", "", "", "")
    _, first, middle, last, end = re.split("|".join(_CONTENTS), text)
    asked = _rendered(template, turns[:3], ask=True).rpartition(_CONTENTS[2])[2]
    shared = common_start(common_start(first, last), asked) if asked else common_start(first, last)
    return Headers(
        _system(template, turns, special),
        _header(middle, end, special),
        _header(shared.partition("<think>")[0], end, special),
        end.strip(),
    )


def _system(template: ChatTemplate, turns: Sequence[Message], special: Sequence[str]) -> str:
    """Return the first line before a system message; "" if it is not a separate turn."""
    text = _rendered(template, [{"role": "system", "content": _SYSTEM}, *turns])
    if not _holds_in_order(text, (_SYSTEM, *_CONTENTS)):
        return ""
    header = _header(text.partition(_SYSTEM)[0], "", special)
    return header.splitlines()[0] if header else ""


def _rendered(template: ChatTemplate, turns: Sequence[Message], *, ask: bool = False) -> str:
    with suppress(ChatTemplateError):
        return template.render(turns, add_generation_prompt=ask)
    return ""


def _holds_in_order(text: str, marks: Sequence[str]) -> bool:
    """Return whether a text contains each mark once, in this order."""
    places = [text.find(mark) for mark in marks]
    is_once = all(text.count(mark) == 1 for mark in marks)
    return is_once and places == sorted(places)


def _header(between: str, end: str, special: Sequence[str]) -> str:
    """Return the text after the end of a turn, without BOS and EOS tokens."""
    header = between[len(common_start(between, end)) :].strip()
    while header.startswith(tuple(special)):
        token = next(token for token in special if header.startswith(token))
        header = header.removeprefix(token).strip()
    return header
