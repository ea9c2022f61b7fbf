"""Records to running text: what the model reads, and which of it counts."""

from collections.abc import Iterator
from dataclasses import dataclass

from logratio.data.chat import ChatTemplate, ChatTemplateError
from logratio.data.messages import bare
from logratio.data.records import Completion, InvalidRecordError, Message, PreferenceRecord, Text

Turns = tuple[Message, ...]

_MARK = "\ue000answer\ue001"  # of private use: no template and no text holds it


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
        moved: Whether each completion had to be looked for behind a prompt that its template
            writes differently once the answer follows.
    """

    prompt: str
    completions: tuple[tuple[Piece, ...], ...]
    moved: tuple[bool, ...]

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
    return Script(str(record.prompt), completions, (False,) * len(completions))


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
            be found in what the template writes.
    """
    prompt = _turns(record.prompt)
    try:
        asked = template.render(prompt, tools=record.tools, add_generation_prompt=True)
        written = [
            (_plain_pieces(completion), False)
            if isinstance(completion.answer, str)  # what a turn begins with
            else _chat_pieces(_Chat(template, eos, record, completion), len(prompt), asked)
            for completion in record.completions
        ]
    except ChatTemplateError as error:
        raise InvalidRecordError("E403", str(error)) from error
    return Script(
        asked, tuple(pieces for pieces, _ in written), tuple(moved for _, moved in written)
    )


def _turns(text: Text) -> Turns:
    return text if isinstance(text, tuple) else ()


def _chat_pieces(chat: "_Chat", first: int, asked: str) -> tuple[tuple[Piece, ...], bool]:
    """Cut a completion that begins with turn ``first``; say whether its boundary moved."""
    position = chat.start_of(first, asked)
    pieces = []
    for index in chat.answers:
        start = position if index == first else chat.start_of(index)
        end = chat.end_of(index)
        if not position <= start <= end:
            raise chat.not_found()
        if start > position:
            pieces.append(Piece(chat.text[position:start], False))
        pieces.append(Piece(chat.text[start:end], True))
        position = end
    return tuple(pieces), not chat.text.startswith(asked)


class _Chat:
    """A whole chat as rendered, and where in it each turn stands.

    Attributes:
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
        answer = _turns(completion.answer)
        self._template = template
        self._tools = record.tools
        self._eos = eos or "\0"  # which no template writes
        self._turns = (*before, *map(bare, answer))
        self.text = self._render(self._turns)
        self.answers = [
            len(before) + index
            for index, turn in enumerate(answer)
            if turn["role"] == "assistant" and turn.get("weight") != 0
        ]

    def _render(self, turns: Turns, *, ask: bool = False) -> str:
        return self._template.render(turns, tools=self._tools, add_generation_prompt=ask)

    def start_of(self, index: int, asked: str | None = None) -> int:
        """Find where the assistant begins to speak in a turn, behind what asks it to."""
        if asked is None:
            asked = self._render(self._turns[:index], ask=True)
        return len(asked) if self.text.startswith(asked) else self._around(index)[0]

    def end_of(self, index: int) -> int:
        """Find where a turn ends: with its end-of-text token, without white space behind it."""
        is_last = index == len(self._turns) - 1
        told = self.text if is_last else self._render(self._turns[: index + 1])
        if self.text.startswith(told):
            trimmed = told.rstrip()
            return len(trimmed) if trimmed.endswith(self._eos) else len(told)
        end = self._around(index)[1]
        return end + len(self._eos) if self.text.startswith(self._eos, end) else end

    def _around(self, index: int) -> tuple[int, int]:
        """Find where a turn's words start and end by writing the chat with a mark in their place.

        Needed where a template writes what stands before or behind them differently later on:
        those of thinking models ask with "<think>" and leave it out once the answer is there.
        """
        marked = list(self._turns)
        marked[index] = {**marked[index], "content": _MARK}
        before, mark, behind = self._render(tuple(marked)).partition(_MARK)
        end = len(self.text) - len(behind)
        if not (mark and self.text.startswith(before) and self.text.endswith(behind)):
            raise self.not_found()
        return len(before), end

    def not_found(self) -> InvalidRecordError:
        """Make the error for an answer that the template hides."""
        reason = "the chat template writes the prompt differently once the answer follows"
        return InvalidRecordError("E404", f"{reason}, and the answer cannot be found in it")
