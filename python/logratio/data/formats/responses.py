"""The answers of a row with their prompt, and the parsed row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logratio.data import conversations
from logratio.data.formats.prompts import MAINS, find_main, read_question, read_tools, with_system
from logratio.data.formats.row import FLAGS, RowView, Shape, called, chat, opens, parsed
from logratio.data.formats.settings import FormatSettings, Kind
from logratio.data.messages import ASSISTANT, Turns, bare, read_messages
from logratio.data.readers.json import parse_value
from logratio.data.records import CHOSEN, REJECTED, Completion, InvalidRecordError, Message, Text


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its answers.

    Attributes:
        main: The name that held the question. None: the answers contained it.
        prompt: Plain text, or the turns of a chat.
        parts: For each answer its context, which is not trained, and its trained part.
        tools: Descriptions of the functions that the assistant may call.
        is_whole: Whether the answers were whole chats or transcripts.
    """

    main: str | None
    prompt: Text
    parts: Sequence[tuple[Text, Text]]
    tools: tuple[Message, ...] = ()
    is_whole: bool = False


def read_answers(view: RowView, names: Sequence[str]) -> Answered:
    """Parse the answers under some names, and their question.

    Raises:
        InvalidRecordError: Every error in one of them.
    """
    shapes: list[Shape] = [_shape(view, name) for name in names]
    values = {view.key(name): view.take(name) for name in names}
    return combine(view, values, shapes)


def combine(view: RowView, values: Mapping[str, Any], shapes: Sequence[Shape]) -> Answered:
    """Combine answers with the row's question.

    Args:
        view: The row.
        values: The answers by their names in errors.
        shapes: The shape of each answer.

    Raises:
        InvalidRecordError: E2xx if the answers are of different kinds or do not match the question,
            E403 for an invalid order of roles.
    """
    if _may_spell_chats(view, values):
        values = view.chats(values, _asked(view, values))
        shapes = [
            _shape_of_chat(value) or shape
            for value, shape in zip(values.values(), shapes, strict=True)
        ]
    elif set(shapes) == {"text"}:
        view.is_spelled = False
    kinds = {"messages" if shape in ("message", "empty") else shape for shape in shapes}
    if kinds == {"text"}:
        return _texts(view, values)
    if kinds == {"messages"}:
        chats = {name: _listed(value) for name, value in values.items()}
        return _chats(view, chats)
    named = ", ".join(
        f"`{name}` is {called(shape)}" for name, shape in zip(values, shapes, strict=True)
    )
    raise InvalidRecordError("E206", f"the answers are not of one kind: {named}")


def _may_spell_chats(view: RowView, answers: Mapping[str, Any]) -> bool:
    cells = (*answers.values(), *map(view.peek, MAINS))
    return any(isinstance(cell, str) and opens(cell) for cell in cells)


def _asked(view: RowView, answers: Mapping[str, Any]) -> str | None:
    """Return the name of the question; whole chats contain it, and the row may repeat it."""
    chats = {n: chat(a) if isinstance(a, str) else a for n, a in answers.items()}
    if all(isinstance(turns, list) and _is_whole(turns, name) for name, turns in chats.items()):
        return _repeated_question(view)
    return find_main(view)


def _shape_of_chat(value: Any) -> Shape | None:
    if isinstance(value, dict):
        return "message"
    return ("messages" if value else "empty") if isinstance(value, list) else None


def _shape(view: RowView, name: str) -> Shape:
    if not view.has(name):
        view.take(name)  # raises the error
    shape = view.shape(name)
    if shape in ("flag", "number"):
        raise view.wrong(name, "a string or a list of messages")
    if shape == "strings":
        raise InvalidRecordError(
            "E203", f"{view.key(name)!r} is a list of strings, not a string or a list of messages"
        )
    return shape


def _texts(view: RowView, values: Mapping[str, str]) -> Answered:
    main = find_main(view)
    if main is None:
        return _transcripts(view, values)
    question = read_question(view, main)
    prompt = question.prompt
    if not isinstance(prompt, str):
        parts = [((), ({"role": ASSISTANT, "content": value},)) for value in values.values()]
        return Answered(main, prompt, parts, question.tools)
    # Some datasets repeat the prompt in each answer; it must not be trained twice.
    if len(prompt.split()) > 1 and all(value.startswith(prompt) for value in values.values()):
        names = " and ".join(f"`{name}`" for name in values)
        reason = f"{names} begin with the whole prompt, which would be read twice: remove it there"
        raise InvalidRecordError("E211", reason)
    return Answered(main, prompt, [("", value) for value in values.values()])


def _transcripts(view: RowView, values: Mapping[str, str]) -> Answered:
    if not any(map(conversations.is_transcript, values.values())):
        view.take("prompt")
    prompt, parts = conversations.split_transcript(dict(values))
    return Answered(None, prompt, parts, is_whole=True)


def _chats(view: RowView, chats: dict[str, list[Any]]) -> Answered:
    whole = any(_is_whole(chat, name) for name, chat in chats.items())
    if whole:
        return _whole_chats(view, chats)
    question = read_question(view, find_main(view) or "prompt")
    parts = [((), conversations.answer(chat, name)) for name, chat in chats.items()]
    tools = question.tools or (read_tools(view) if isinstance(question.prompt, str) else ())
    return Answered(question.main, question.turns(), parts, tools)


def _is_whole(chat: list[Any], name: str) -> bool:
    """Return whether a chat includes its question: neither the assistant nor a tool begins it."""
    return bool(chat) and read_messages(chat[:1], name)[0]["role"] not in (ASSISTANT, "tool")


def _whole_chats(view: RowView, chats: dict[str, list[Any]]) -> Answered:
    prompt, parts = conversations.split(chats)
    turns = {name: tuple(map(bare, read_messages(chat, name))) for name, chat in chats.items()}
    main = _repeated_question(view)
    if main is not None:
        _check_repeats(view, main, turns)
    for name in ("messages", "conversations"):
        _check_copy(view, name, turns)
    return Answered(main, with_system(view, prompt), parts, read_tools(view), is_whole=True)


def _repeated_question(view: RowView) -> str | None:
    names = ("prompt", "question", "instruction", "query")
    return next((name for name in names if view.has(name)), None)


def _check_repeats(view: RowView, main: str, chats: dict[str, Turns]) -> None:
    """Refuse whole chats that do not contain the question given next to them."""
    value = view.take(main)
    for name, turns in chats.items():
        if isinstance(value, str):
            asked = [turn.get("content") or "" for turn in turns if turn["role"] == "user"]
            if value.strip() not in [text.strip() for text in asked]:
                raise _not_held(name, view.key(main), "E211")
        elif not isinstance(value, list):
            raise view.wrong(main, "a string or a list of messages")
        elif not _begins(turns, value, view.key(main)):
            raise _not_held(name, view.key(main), "E403")


def _check_copy(view: RowView, name: str, chats: dict[str, Turns]) -> None:
    """Refuse a further chat, which is not read, unless one of the chats begins with it."""
    value = view.peek(name)
    if not isinstance(value, list) or not value:
        return
    if not any(_begins(turns, value, view.key(name)) for turns in chats.values()):
        raise _not_held(" and ".join(chats), view.key(name), "E211")


def _begins(turns: Turns, value: list[Any], name: str) -> bool:
    start = tuple(map(bare, read_messages(value, name)))
    return turns[: len(start)] == start


def _not_held(chat: str, name: str, code: str) -> InvalidRecordError:
    reason = f"{chat!r} is a whole chat, but {name!r} is not part of it: remove one of them"
    return InvalidRecordError(code, reason)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_PROMPT = "prompt"


def read_turns(view: RowView, names: tuple[str, str], settings: FormatSettings) -> Answered | None:
    """Parse two conversations with the same user turns, as in Chatbot Arena's 55k.

    A null answer counts as an empty one.

    Returns:
        The common turns, and the history and last answer of each side. None if the prompt is not a
        list of turns, or if ``--strings text`` makes it text.

    Raises:
        InvalidRecordError: E215 if an answer is a string that spells no list, E203 if it has
            another type, E403 if it has a different number of turns than the prompt.
    """
    asked = _turns(view.peek(_PROMPT))
    if asked is None or None in asked or settings.strings == "text":
        return None
    chats = {view.key(name): _chat(view, name, asked) for name in names}
    view.is_spelled = isinstance(view.take(_PROMPT), str)
    prompt, parts = conversations.split(chats)
    return Answered(_PROMPT, with_system(view, prompt), parts, read_tools(view), is_whole=True)


def _chat(view: RowView, name: str, asked: list[str | None]) -> list[Message]:
    """Interleave the user's turns with those of a model."""
    value, prompt = view.take(name), view.key(_PROMPT)
    answers = _turns(value)
    if answers is None:
        if not isinstance(value, str):
            raise view.wrong(name, "a list of strings")
        reason = f"{prompt!r} spells a list of turns, but {view.key(name)!r} is plain text: {FLAGS}"
        raise InvalidRecordError("E215", reason)
    if len(answers) != len(asked):
        reason = f"{view.key(name)!r} has {len(answers)} turns, but {prompt!r} has {len(asked)}"
        raise InvalidRecordError("E403", reason)
    return [
        {"role": role, "content": text or ""}
        for exchange in zip(asked, answers, strict=True)
        for role, text in zip(("user", ASSISTANT), exchange, strict=True)
    ]


def _turns(cell: Any) -> list[str | None] | None:
    """Return a list of strings and nulls, which may be JSON in a string; None for other values."""
    value = parsed(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list) or not value:
        return None
    if not all(item is None or isinstance(item, str) for item in value):
        return None
    if isinstance(cell, str):
        _check(cell)
    return value


def _check(text: str) -> None:
    """Refuse JSON with partial_pair a character."""
    try:
        parse_value(text)
    except InvalidRecordError:
        raise
    except ValueError:  # a repr is not JSON
        pass


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A parsed row, before it becomes records.

    Attributes:
        format: The name of its format.
        kind: A pair, unpaired feedback, a group, or a demonstration.
        prompt: The prompt of every completion.
        completions: The completions; those of a group in the row's order.
        tools: Descriptions of the functions that the assistant may call.
        ends: Whether the completions are complete; a single step is not.
        values: Of a group, the value of each completion; larger is better.
        is_binary: Whether the values are only good or bad: equal values are then not a tie.
        warnings: Codes of the row's warnings.
    """

    format: str
    kind: Kind
    prompt: Text
    completions: tuple[Completion, ...]
    tools: tuple[Message, ...] = ()
    ends: bool = True
    values: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()
    is_binary: bool = False


def pair(format_name: str, answered: Answered) -> ParsedRow:
    """Build a pair from two answers, the better one first."""
    completions = tuple(
        Completion(role, answer, context)
        for role, (context, answer) in zip((CHOSEN, REJECTED), answered.parts, strict=True)
    )
    return ParsedRow(format_name, "pair", answered.prompt, completions, answered.tools)
