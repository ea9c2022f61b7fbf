"""What a chat template leaves out of a row: found by rendering the row once more without it.

A template is free to ignore what it has no place for: tool calls, reasoning, names, whole turns of
roles that it does not know. Such a row is kept, since what is left is what the model reads, and
named: W513, or W514 where only the reasoning of turns before the answer is gone, which is how
thinking models are used. Where nothing of an answer is left, the row is refused (R311).

Content that is found anywhere in the rendered text counts as written, so that most rows
cost no further rendering: a short content that another turn repeats can be missed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from logratio.data.chat import MARK, REASONING, ChatTemplate, ChatTemplateError
from logratio.data.codes import Omitted
from logratio.data.messages import ASSISTANT, Turns
from logratio.data.records import Completion, InvalidRecordError, Message, PreferenceRecord

_KEYS = {
    "tool_calls": "tool calls",
    "name": "a name",
    "documents": "documents",
    "refusal": "a refusal",
    **dict.fromkeys(("image", "images"), "images"),
    **dict.fromkeys(("video", "videos"), "videos"),
    **dict.fromkeys(("audio", "audios"), "audio"),
}
"""Keys of a message, besides role, content and reasoning, that say something to a model."""

_END_OF_THOUGHT = "</think>"


class RenderedChat(Protocol):
    """A whole chat, and what its template writes."""

    completion: Completion
    turns: Turns
    text: str
    answers: list[int]


def check_written(chat: RenderedChat, template: ChatTemplate, tools: Sequence[Message]) -> None:
    """Refuse a completion of which the template writes nothing.

    Raises:
        InvalidRecordError: R311.
    """
    spoken = [chat.turns[index] for index in chat.answers]
    if any(content and content in chat.text for content in map(_content, spoken)):
        return
    turns = list(chat.turns)
    for index in chat.answers:
        turns[index] = {"role": ASSISTANT, "content": ""}
    if _is_same(chat.text, template, turns, tools):
        held = ", ".join(sorted({key for turn in spoken for key in turn if key != "role"}))
        reason = f"the chat template writes nothing of the {chat.completion.role} answer"
        raise InvalidRecordError("R311", f"{reason}, which holds: {held}")


def omissions(
    record: PreferenceRecord, asked: str, chats: Sequence[RenderedChat], template: ChatTemplate
) -> list[str]:
    """Name what the template leaves out of a record.

    Args:
        record: The record.
        asked: Its prompt, as the template asks for an answer.
        chats: Its completions behind the prompt.
        template: What rendered them.

    Returns:
        At most one W513, which names all that is missing, and one W514.
    """
    missing: dict[str, None] = {}
    is_thought_gone = False
    prompt: Turns = record.prompt if isinstance(record.prompt, tuple) else ()
    if record.tools and _is_same(asked, template, prompt, (), ask=True):
        missing["tools"] = None
    for number, chat in enumerate(chats):
        # The turns of the prompt are the same in each: one look is enough.
        for index in range(len(prompt) if number else 0, len(chat.turns)):
            for what in _left_out(chat, index, template, record.tools):
                if what == "reasoning" and index not in chat.answers:
                    is_thought_gone = True
                else:
                    missing[what] = None
    return [*[Omitted("W513", ", ".join(missing))] * bool(missing), *["W514"] * is_thought_gone]


def _left_out(
    chat: RenderedChat, index: int, template: ChatTemplate, tools: Sequence[Message]
) -> Iterator[str]:
    """Name what is missing of one turn."""
    turn = chat.turns[index]

    def is_same(changed: Message) -> bool:
        turns = (*chat.turns[:index], changed, *chat.turns[index + 1 :])
        return _is_same(chat.text, template, turns, tools)

    content = _content(turn)
    if content and content not in chat.text:
        yield from _left_out_of_content(turn, chat.text, is_same)
    for keys, what in _groups_of_keys(turn):
        if is_same({key: value for key, value in turn.items() if key not in keys}):
            yield what


def _groups_of_keys(turn: Message) -> Iterator[tuple[Sequence[str], str]]:
    """Yield the keys of a turn that say the same, and what that is."""
    if len(turn) == 2:
        return
    if any(turn.get(key) for key in REASONING):
        yield REASONING, "reasoning"
    for key, what in _KEYS.items():
        # A tool's name is that of the call, which its turn follows.
        if turn.get(key) and not (key == "name" and turn["role"] == "tool"):
            yield (key,), what


def _left_out_of_content(turn: Message, text: str, is_same: Any) -> Iterator[str]:
    """Look for lines that are missing, and make sure that what is in them makes no difference."""
    content = turn["content"]
    thought, end, said = content.rpartition(_END_OF_THOUGHT)
    for part, what in ((thought, "reasoning"), (said, f"content of a turn of {turn['role']}")):
        lines = filter(None, map(str.strip, part.replace("<think>", "\n").splitlines()))
        line = min(lines, key=lambda line: line in text, default=None)  # the first that is missing
        if line is None:
            continue
        marked = part.replace(line, line + MARK, 1)
        whole = marked + end + said if part is thought else thought + end + marked
        if is_same({**turn, "content": whole}):
            yield what


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    return content.strip() if isinstance(content, str) else ""


def _is_same(
    text: str,
    template: ChatTemplate,
    turns: Sequence[Message],
    tools: Sequence[Message],
    *,
    ask: bool = False,
) -> bool:
    """Say whether a template writes the same text of other turns; it may refuse them."""
    try:
        return template.render(turns, tools=tools, add_generation_prompt=ask) == text
    except ChatTemplateError:
        return False
