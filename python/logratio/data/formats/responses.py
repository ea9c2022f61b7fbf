"""The answers of a row with their prompt, and what a row says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logratio.data import conversations
from logratio.data.formats.prompts import MAINS, find_main, read_question, read_tools, with_system
from logratio.data.formats.row import FLAGS, Shape, View, called, chat, opens, parsed
from logratio.data.formats.settings import FormatSettings, Kind
from logratio.data.messages import ASSISTANT, Turns, bare, read_messages
from logratio.data.readers.json import parse_value
from logratio.data.records import CHOSEN, REJECTED, Completion, InvalidRecordError, Message, Text


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and what each answer goes on with.

    Attributes:
        main: The name under which the question stood; None where the answers carried it.
        prompt: Plain text, or turns of a chat.
        parts: For each answer what does not count of it, and what does.
        tools: What the assistant may call.
        is_whole: Whether the answers held the whole chat.
    """

    main: str | None
    prompt: Text
    parts: Sequence[tuple[Text, Text]]
    tools: tuple[Message, ...] = ()
    is_whole: bool = False


def read_answers(view: View, names: Sequence[str]) -> Answered:
    """Read answers that stand under names of their own, and their question.

    Raises:
        InvalidRecordError: Whatever is wrong with one of them.
    """
    shapes: list[Shape] = [_shape(view, name) for name in names]
    values = {view.key(name): view.take(name) for name in names}
    return put_together(view, values, shapes)


def put_together(view: View, values: Mapping[str, Any], shapes: Sequence[Shape]) -> Answered:
    """Find the question of answers that are at hand.

    Args:
        view: The row.
        values: The answers under the names that errors call them by.
        shapes: What each of them is.

    Raises:
        InvalidRecordError: E2xx where the answers are of different kinds or do not go with the
            question, E403 where turns do not fit.
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


def _may_spell_chats(view: View, answers: Mapping[str, Any]) -> bool:
    cells = (*answers.values(), *map(view.peek, MAINS))
    return any(isinstance(cell, str) and opens(cell) for cell in cells)


def _asked(view: View, answers: Mapping[str, Any]) -> str | None:
    """Find the name of the question; answers that are whole chats hold it, and may repeat it."""
    chats = {n: chat(a) if isinstance(a, str) else a for n, a in answers.items()}
    if all(isinstance(turns, list) and _is_whole(turns, name) for name, turns in chats.items()):
        return _beside(view)
    return find_main(view)


def _shape_of_chat(value: Any) -> Shape | None:
    if isinstance(value, dict):
        return "message"
    return ("messages" if value else "empty") if isinstance(value, list) else None


def _shape(view: View, name: str) -> Shape:
    if not view.has(name):
        view.take(name)  # which says what is wrong with it
    shape = view.shape(name)
    if shape in ("flag", "number"):
        raise view.wrong(name, "a string or a list of messages")
    if shape == "strings":
        raise InvalidRecordError(
            "E203", f"{view.key(name)!r} is a list of strings, not a string or a list of messages"
        )
    return shape


def _texts(view: View, values: Mapping[str, str]) -> Answered:
    main = find_main(view)
    if main is None:
        return _transcripts(view, values)
    question = read_question(view, main)
    prompt = question.prompt
    if not isinstance(prompt, str):
        said = [((), ({"role": ASSISTANT, "content": value},)) for value in values.values()]
        return Answered(main, prompt, said, question.tools)
    # Some sets repeat the prompt in each side; it must not be read twice.
    if len(prompt.split()) > 1 and all(value.startswith(prompt) for value in values.values()):
        names = " and ".join(f"`{name}`" for name in values)
        reason = f"{names} begin with the whole prompt, which would be read twice: leave it out"
        raise InvalidRecordError("E211", reason)
    return Answered(main, prompt, [("", value) for value in values.values()])


def _transcripts(view: View, values: Mapping[str, str]) -> Answered:
    if not any(map(conversations.is_transcript, values.values())):
        view.take("prompt")
    prompt, parts = conversations.split_transcript(dict(values))
    return Answered(None, prompt, parts, is_whole=True)


def _chats(view: View, chats: dict[str, list[Any]]) -> Answered:
    whole = any(_is_whole(chat, name) for name, chat in chats.items())
    if whole:
        return _whole_chats(view, chats)
    question = read_question(view, find_main(view) or "prompt")
    parts = [((), conversations.answer(chat, name)) for name, chat in chats.items()]
    tools = question.tools or (read_tools(view) if isinstance(question.prompt, str) else ())
    return Answered(question.main, question.turns(), parts, tools)


def _is_whole(chat: list[Any], name: str) -> bool:
    """Say whether a chat holds its question, too: neither the assistant nor a tool begins it."""
    return bool(chat) and read_messages(chat[:1], name)[0]["role"] not in (ASSISTANT, "tool")


def _whole_chats(view: View, chats: dict[str, list[Any]]) -> Answered:
    prompt, parts = conversations.split(chats)
    turns = {name: tuple(map(bare, read_messages(chat, name))) for name, chat in chats.items()}
    main = _beside(view)
    if main is not None:
        _check_repeats(view, main, turns)
    for name in ("messages", "conversations"):
        _check_copy(view, name, turns)
    return Answered(main, with_system(view, prompt), parts, read_tools(view), is_whole=True)


def _beside(view: View) -> str | None:
    names = ("prompt", "question", "instruction", "query")
    return next((name for name in names if view.has(name)), None)


def _check_repeats(view: View, main: str, chats: dict[str, Turns]) -> None:
    """Make sure that whole chats hold the question that stands beside them."""
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


def _check_copy(view: View, name: str, chats: dict[str, Turns]) -> None:
    """Make sure that a further chat, which is not read, says nothing of its own."""
    value = view.peek(name)
    if not isinstance(value, list) or not value:
        return
    if not any(_begins(turns, value, view.key(name)) for turns in chats.values()):
        raise _not_held(" and ".join(chats), view.key(name), "E211")


def _begins(turns: Turns, value: list[Any], name: str) -> bool:
    start = tuple(map(bare, read_messages(value, name)))
    return turns[: len(start)] == start


def _not_held(chat: str, name: str, code: str) -> InvalidRecordError:
    reason = f"{chat!r} is a whole chat, and {name!r} is no part of it: leave one of them out"
    return InvalidRecordError(code, reason)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


_PROMPT = "prompt"


def read_turns(view: View, names: tuple[str, str], settings: FormatSettings) -> Answered | None:
    """Read two conversations whose first turns are the same question, as Chatbot Arena's 55k has.

    An answer of null is an empty one.

    Returns:
        What both share, and each one's history and last answer; None where the prompt is no list
        of turns, or is text by the user's word.

    Raises:
        InvalidRecordError: E215 where an answer is a string that spells no list, E203 where it is
            of another type, E403 where it has not as many turns as the prompt.
    """
    asked = _turns(view.peek(_PROMPT))
    if asked is None or None in asked or settings.strings == "text":
        return None
    chats = {view.key(name): _chat(view, name, asked) for name in names}
    view.is_spelled = isinstance(view.take(_PROMPT), str)
    prompt, parts = conversations.split(chats)
    return Answered(_PROMPT, with_system(view, prompt), parts, read_tools(view), is_whole=True)


def _chat(view: View, name: str, asked: list[str | None]) -> list[Message]:
    """Put the user's turns and a model's together."""
    value, prompt = view.take(name), view.key(_PROMPT)
    said = _turns(value)
    if said is None:
        if not isinstance(value, str):
            raise view.wrong(name, "a list of strings")
        reason = f"{prompt!r} spells a list of turns, and {view.key(name)!r} is plain text: {FLAGS}"
        raise InvalidRecordError("E215", reason)
    if len(said) != len(asked):
        reason = f"{view.key(name)!r} has {len(said)} turns, and {prompt!r} has {len(asked)}"
        raise InvalidRecordError("E403", reason)
    return [
        {"role": role, "content": text or ""}
        for exchange in zip(asked, said, strict=True)
        for role, text in zip(("user", ASSISTANT), exchange, strict=True)
    ]


def _turns(cell: Any) -> list[str | None] | None:
    """Return a list of strings and nulls, which may be written as JSON; None for anything else."""
    value = parsed(cell) if isinstance(cell, str) else cell
    if not isinstance(value, list) or not value:
        return None
    if not all(item is None or isinstance(item, str) for item in value):
        return None
    if isinstance(cell, str):
        _check(cell)
    return value


def _check(text: str) -> None:
    """Refuse JSON with half a character."""
    try:
        parse_value(text)
    except InvalidRecordError:
        raise
    except ValueError:  # a repr is no JSON
        pass


@dataclass(frozen=True, slots=True)
class Meaning:
    """A row's content.

    Attributes:
        format: The name of its format.
        kind: A pair, unpaired feedback, a group in order, a demonstration.
        prompt: What every completion answers.
        completions: Of a group, as the row has them.
        tools: What the assistant may call.
        ends: Whether the completions come to their end.
        values: Of a group, how good each completion is; larger is better.
        is_sided: Whether the values only tell good from bad: equal ones are then no tie.
        warnings: Codes of what is to be counted of the row, which is kept.
    """

    format: str
    kind: Kind
    prompt: Text
    completions: tuple[Completion, ...]
    tools: tuple[Message, ...] = ()
    ends: bool = True
    values: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()
    is_sided: bool = False


def pair(format_name: str, answered: Answered) -> Meaning:
    """Make a pair of two answers, the better one first."""
    completions = tuple(
        Completion(role, answer, context)
        for role, (context, answer) in zip((CHOSEN, REJECTED), answered.parts, strict=True)
    )
    return Meaning(format_name, "pair", answered.prompt, completions, answered.tools)
