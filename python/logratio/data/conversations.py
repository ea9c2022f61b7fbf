"""Split conversations and Anthropic-HH transcripts into prompt and answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from logratio.data.messages import ASSISTANT, Turns, bare, read_messages
from logratio.data.records import InvalidRecordError, Message, PreferenceRecord

_HEADER = re.compile(r"\n\n(Human|Assistant):")
_ASSISTANT = "Assistant"


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a transcript: the speaker, the words, and where they start."""

    speaker: str
    words: str
    start: int


def is_transcript(text: str) -> bool:
    """Return whether a text contains a turn of each speaker."""
    return "\n\nHuman:" in text and "\n\nAssistant:" in text


def split_transcript(texts: dict[str, str]) -> tuple[str, list[tuple[str, str]]]:
    """Split transcripts into their common prompt and the rest of each.

    The split is between turns, never inside one, so answers keep a common beginning. The prompt
    ends with the last "Assistant:" before the first turn that differs.

    Args:
        texts: The transcripts, by their names in errors.

    Returns:
        The prompt, and for each transcript its history (not trained, usually empty) and its final
        answer.

    Raises:
        InvalidRecordError: E403 if a transcript does not end with an Assistant turn.
    """
    turns = [_turns(name, text) for name, text in texts.items()]
    start = _prompt_end(turns)
    parts = []
    for text, own in zip(texts.values(), turns, strict=True):
        answer = own[-1].start
        parts.append((text[start:answer], text[answer:]))
    return next(iter(texts.values()))[:start], parts


def as_chat(record: PreferenceRecord) -> PreferenceRecord:
    """Convert a record of plain text to a chat: a user turn and an assistant turn.

    An incomplete answer (a step of a solution) remains text after the turns.
    """
    text = str(record.prompt)
    prompt = _messages(text, "user") if is_transcript(text) else (_message("user", text),)
    if not record.ends:
        return replace(record, prompt=prompt)
    completions = tuple(
        replace(
            completion,
            answer=(_message("assistant", str(completion.answer).strip()),),
            context=_messages(str(completion.context), "assistant"),
        )
        for completion in record.completions
    )
    return replace(record, prompt=prompt, completions=completions)


def _messages(text: str, first: str) -> tuple[Message, ...]:
    """Parse the turns of a transcript; words before its first header have the role `first`."""
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
    if headers[0].start():  # words before the first turn, perhaps an instruction
        turns.insert(0, Turn("", text[: headers[0].start()], 0))
    return turns


def _prompt_end(turns: list[list[Turn]]) -> int:
    """Return the position after the last "Assistant:" up to which all turns are equal."""
    end = 0
    for column in zip(*turns, strict=False):
        if len({turn.speaker for turn in column}) > 1:
            break
        if column[0].speaker == _ASSISTANT:
            end = column[0].start
        if len({turn.words for turn in column}) > 1:
            break
    return end


def prompt(value: Sequence[Any], name: str) -> Turns:
    """Check the turns before an answer.

    Raises:
        InvalidRecordError: E2xx for malformed messages; E403 without a user turn, or if the last
            turn is the assistant's.
    """
    return _asking(read_messages(value, name), name)


def answer(value: Sequence[Any], name: str) -> Turns:
    """Check the turns of an answer, which begin with the assistant's.

    All turns of the assistant are trained, except those of weight 0.

    Raises:
        InvalidRecordError: E2xx for malformed messages, E208 if no turn is trained, E403 for
            another first role, R301 for no message.
    """
    if not value:
        raise InvalidRecordError("R301", f"{name!r} is an empty list")
    return _answer(read_messages(value, name), name)


def split(sides: Mapping[str, Sequence[Any]]) -> tuple[Turns, list[tuple[Turns, Turns]]]:
    """Split whole chats into their common turns and the rest of each.

    The prompt ends before an assistant turn and is equal in all chats. The answer of a chat is the
    part after its last user turn, and its remaining turns are history, which is not trained. With
    weights, the answer begins with the first trained turn. (A common turn would add the same
    log-prob to every side, so training it would make no difference. Turns whose weights differ,
    and are not just 0 and 1, are not common.)

    Raises:
        InvalidRecordError: E2xx for malformed messages; E403 if the chats share no user turn or one
            has no assistant turn.
    """
    chats = [read_messages(value, name) for name, value in sides.items()]
    for name, chat in zip(sides, chats, strict=True):
        _check_answered(chat, name)
    plain = [tuple(map(bare, ended(chat))) for chat in chats]
    end = _shared([tuple(map(_graded, ended(chat))) for chat in chats])
    while end and not _asks(plain, end):
        end -= 1
    shared = " and ".join(repr(name) for name in sides)
    start = _asking(plain[0][:end], f"the shared beginning of {shared}")
    parts = []
    for name, chat in zip(sides, chats, strict=True):
        history, own = _history_and_answer(chat[end:])
        parts.append((tuple(map(bare, history)), _answer(own, f"the answer of {name}")))
    return start, parts


def split_demonstration(value: Sequence[Any], name: str) -> tuple[Turns, Turns]:
    """Split a chat before the assistant's first turn; all assistant turns are then trained.

    Raises:
        InvalidRecordError: As `prompt` and `answer` do.
    """
    turns = read_messages(value, name)
    first = next((i for i, turn in enumerate(turns) if turn["role"] == ASSISTANT), len(turns))
    if first == len(turns):
        raise InvalidRecordError("R301", f"{name!r} holds no answer")
    return _asking(tuple(map(bare, turns[:first])), name), _answer(turns[first:], name)


def split_last(value: Sequence[Any], name: str) -> tuple[Turns, Turns]:
    """Split a chat before its final answer; earlier assistant turns are not trained.

    With weights, the answer begins with the first trained turn.

    Raises:
        InvalidRecordError: As `split` does.
    """
    turns = read_messages(value, name)
    _check_answered(turns, name)
    history, own = _history_and_answer(turns)
    return _asking(tuple(map(bare, history)), name), _answer(own, name)


def words(turns: Turns) -> str:
    """Return the words of the trained turns, including tool calls."""
    return "".join(
        str(turn.get("content") or turn.get("tool_calls") or "") for turn in turns if counts(turn)
    )


def counts(turn: Mapping[str, Any]) -> bool:
    """Return whether a turn of an answer is trained."""
    return turn["role"] == ASSISTANT and turn.get("weight") != 0


def ended(turns: Turns) -> Turns:
    """Drop the turns after the assistant's last."""
    spoken = [index for index, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    return turns[: spoken[-1] + 1] if spoken else ()


def _check_answered(chat: Turns, name: str) -> None:
    if not ended(chat):
        raise InvalidRecordError("E403", f"the chat in {name!r} holds no assistant turn")


def _asking(turns: Turns, name: str) -> Turns:
    if not any(turn["role"] == "user" for turn in turns):
        raise InvalidRecordError("E403", f"{name!r} holds no user turn")
    if turns[-1]["role"] == ASSISTANT:
        raise InvalidRecordError(
            "E403",
            f"{name!r} ends with an assistant turn, so no answer can follow: if the answers "
            "continue its text, move that text to the start of each answer",
        )
    return tuple(map(bare, turns))


def _answer(turns: Turns, name: str) -> Turns:
    if not turns or turns[0]["role"] != ASSISTANT:
        begins = f"begins with a {turns[0]['role']} turn" if turns else "holds no assistant turn"
        raise InvalidRecordError(
            "E403",
            f"{name!r} {begins}, but an answer begins with an assistant turn: move the turns "
            "before it to the end of the prompt",
        )
    if not any(map(counts, turns)):
        raise InvalidRecordError("E208", f"no turn of {name!r} is trained: all weights are 0")
    # A weight of 1 is the default.
    return tuple(bare(turn) if turn.get("weight") == 1 else turn for turn in turns)


def _graded(turn: Message) -> Message:
    """Return a turn without a weight that only says whether it is trained."""
    return bare(turn) if turn.get("weight") in (0, 1) else turn


def _shared(chats: list[Turns]) -> int:
    """Count the common first turns, leaving at least one turn of each chat."""
    longest = min(map(len, chats)) - 1
    first, *others = chats
    for index in range(longest):
        if any(other[index] != first[index] for other in others):
            return index
    return longest


def _asks(chats: list[Turns], end: int) -> bool:
    """Return whether the next turn of every chat is the assistant's, but not the previous one."""
    is_next = all(chat[end]["role"] == ASSISTANT for chat in chats)
    return is_next and chats[0][end - 1]["role"] != ASSISTANT


def _history_and_answer(chat: Turns) -> tuple[Turns, Turns]:
    turns = ended(chat)
    if any("weight" in turn for turn in turns):
        counted = [index for index, turn in enumerate(turns) if counts(turn)]
        end = counted[0] if counted else len(turns) - 1
    else:
        users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
        end = users[-1] + 1 if users else 0
    return turns[:end], chat[end:]
