r"""Anthropic-HH transcripts: raw text whose turns begin with "\n\nHuman:" or "\n\nAssistant:"."""

import re
from dataclasses import dataclass

from logratio.data.records import InvalidRecordError

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
