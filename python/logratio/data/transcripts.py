r"""Anthropic-HH transcripts, whose turns begin with "\n\nHuman:" or "\n\nAssistant:".

Also plain text as the turns of a chat (`as_chat`), for which a transcript is read turn by turn.
"""

import re
from dataclasses import dataclass, replace

from logratio.data.records import Completion, InvalidRecordError, Message, PreferenceRecord

_HEADER = re.compile(r"\n\n(Human|Assistant):")
_ASSISTANT = "Assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a transcript: who speaks, where the words start and where they end."""

    speaker: str
    words: str
    start: int


def is_transcript(text: str) -> bool:
    """Say whether a text holds a turn of each speaker."""
    return "\n\nHuman:" in text and "\n\nAssistant:" in text


def split(texts: dict[str, str]) -> tuple[str, list[tuple[str, str]]]:
    """Split transcripts into the prompt that they share and what each one goes on with.

    The split is made between turns, never inside one: answers that begin alike keep their
    beginnings. The prompt ends with the last "Assistant:" before the first turn that differs.

    Args:
        texts: The transcripts under the names that errors call them by.

    Returns:
        The prompt, and for each transcript its own history (which does not count, usually empty)
        and its final answer.

    Raises:
        InvalidRecordError: E403 where a transcript does not end with an Assistant turn.
    """
    turns = [_turns(name, text) for name, text in texts.items()]
    start = _prompt_end(turns)
    parts = []
    for text, own in zip(texts.values(), turns, strict=True):
        answer = own[-1].start
        parts.append((text[start:answer], text[answer:]))
    return next(iter(texts.values()))[:start], parts


def as_chat(record: PreferenceRecord) -> PreferenceRecord:
    """Read a record of plain text as a chat: the user asks with the prompt, the assistant answers.

    What only begins an answer (a step of a solution) stays text behind the turns.
    """
    text = str(record.prompt)
    prompt = _messages(text, "user") if is_transcript(text) else (_message("user", text),)
    if not record.ends:
        return replace(record, prompt=prompt)
    completions = tuple(
        Completion(
            completion.role,
            (_message("assistant", str(completion.answer).strip()),),
            _messages(str(completion.context), "assistant"),
        )
        for completion in record.completions
    )
    return replace(record, prompt=prompt, completions=completions)


def _messages(text: str, first: str) -> tuple[Message, ...]:
    """Read the turns of a transcript; words before its first header are of the role `first`."""
    before, *rest = _HEADER.split(text)
    spoken = [(first, before)] + [
        ("assistant" if speaker == _ASSISTANT else "user", words)
        for speaker, words in zip(rest[::2], rest[1::2], strict=True)
    ]
    return tuple(_message(role, words.strip()) for role, words in spoken if words.strip())


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _turns(name: str, text: str) -> list[Turn]:
    headers = list(_HEADER.finditer(text))
    if not headers or headers[-1][1] != _ASSISTANT:
        raise InvalidRecordError(
            "E403", f"the transcript in {name!r} does not end with an Assistant turn"
        )
    ends = [header.start() for header in headers[1:]] + [len(text)]
    turns = [
        Turn(header[1], text[header.end() : end], header.end())
        for header, end in zip(headers, ends, strict=True)
    ]
    if headers[0].start():  # words before the first turn: an instruction, perhaps
        turns.insert(0, Turn("", text[: headers[0].start()], 0))
    return turns


def _prompt_end(turns: list[list[Turn]]) -> int:
    """Find the character after the last shared "Assistant:" that every turn before is shared."""
    end = 0
    for column in zip(*turns, strict=False):
        if len({turn.speaker for turn in column}) > 1:
            break
        if column[0].speaker == _ASSISTANT:
            end = column[0].start
        if len({turn.words for turn in column}) > 1:
            break
    return end
