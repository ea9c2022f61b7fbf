"""Records to running text: what the model reads, and which of it counts.

Where the prompt of a chat ends
-------------------------------
A chat template has two ways to write the place where an answer begins: the *asked* text, which ends
with the generation prompt, and the *whole* text of the chat with its answer. A prompt and its
completion are together always the whole text, as the template writes it; no other text is trained
or scored.

- Where every whole text of a group begins with the asked text, the prompt is the asked text. Nearly
  all templates are like this.
- Else the prompt is the longest beginning that the asked text shares with all whole texts of the
  group and with the whole text of a neutral answer, and that ends between two tokens of markup,
  words or runs of white space. R1's template asks with ``<Assistant><think>`` and writes
  ``<Assistant>It is 54.``: the prompt ends with ``<Assistant>``. The record has W512, because
  whoever generates from the asked text begins elsewhere than training did.

The neutral answer keeps the prompt from sharing text with an answer, and makes the prompt of
a shortened group the same for nearly all answers. All completions of a group share one prompt:
where one answer has reasoning and the other has none, both begin where the two texts part. Serving
does the same with the candidates of one request. Their rewards are compared with each other only,
so a constant that depends on where the prompt ends is of no consequence.

What a template leaves out of an answer (reasoning, tool calls, names) is left out here, too, as
`logratio.data.omissions` finds and names. So a template that removes ``<think>…</think>`` from
answers trains answers without it; a template that keeps it has to be given to train it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from logratio.data.chat import MARK, ChatTemplate, ChatTemplateError
from logratio.data.conversations import ended
from logratio.data.messages import Turns, bare
from logratio.data.omissions import check_written, omissions
from logratio.data.records import Completion, InvalidRecordError, PreferenceRecord, Text

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
