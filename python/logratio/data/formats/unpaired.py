"""One completion: with a boolean label, or as a demonstration to imitate."""

from typing import Any

from logratio.data import conversations
from logratio.data.formats.catalogue import ANSWERS, COMPLETIONS, THUMBS
from logratio.data.formats.labels import BAD, GOOD, Label, spelled
from logratio.data.formats.prompts import Question, read_tools, with_system
from logratio.data.formats.responses import ParsedRow, read_answers
from logratio.data.formats.row import RowView
from logratio.data.formats.settings import FormatSettings
from logratio.data.records import CHOSEN, DEMONSTRATION, REJECTED, Completion, InvalidRecordError

_CHATS = ("messages", "conversations")
SIGNS = frozenset(THUMBS)


def claims(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row has a completion, or a chat, and a boolean label."""
    thumb = _thumb(view, settings)
    if thumb is None or isinstance(view.peek(thumb), list):
        return False
    if (
        settings.parsed_label
        and settings.parsed_label.answers()
        and settings.parsed_label.key == thumb
    ):
        return False
    return any(map(view.has, COMPLETIONS)) or any(map(view.has, _CHATS))


def read(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse a completion: its role is chosen if it is good, and rejected if it is bad.

    Raises:
        InvalidRecordError: E209 for a label that is neither a boolean nor explained by ``--label``.
    """
    thumb = _thumb(view, settings)
    if thumb is None:
        raise InvalidRecordError("E201", f"the key {view.key(THUMBS[0])!r} is missing")
    role = CHOSEN if _is_good(view, thumb, settings.parsed_label) else REJECTED
    name = next((name for name in COMPLETIONS if view.has(name)), None)
    if name is not None:
        answered = read_answers(view, (name,))
        ((context, answer),) = answered.parts
        completions = (Completion(role, answer, context),)
        return ParsedRow("kto", "unpaired", answered.prompt, completions, answered.tools)
    question, completion = _chat(view, role)
    return ParsedRow("kto-chat", "unpaired", question.prompt, (completion,), question.tools)


def _chat(view: RowView, role: str) -> tuple[Question, Completion]:
    name = next((name for name in _CHATS if view.has(name)), _CHATS[0])
    value = view.take(name)
    if not isinstance(value, list):
        raise view.wrong(name, "a list of messages")
    turns, answer = conversations.split_last(value, view.key(name))
    return Question(name, with_system(view, turns), read_tools(view)), Completion(role, answer, ())


def _thumb(view: RowView, settings: FormatSettings) -> str | None:
    label = settings.parsed_label
    is_given = label is not None and label.is_thumb() and view.has(label.key)
    names = (label.key,) if label and is_given else THUMBS
    return next((name for name in names if view.has(name)), None)


def _is_good(view: RowView, name: str, label: Label | None) -> bool:
    value = view.take(name)
    key = view.key(name)
    if label and label.is_thumb() and label.key == name:
        meaning = label.meaning(value)
        if meaning not in (GOOD, BAD):
            known = ", ".join(label.meanings)
            reason = f"{key!r} is {spelled(value):.40}, but --label only defines {known}"
            raise InvalidRecordError("E212", reason)
        return meaning == GOOD
    if not isinstance(value, bool):
        reason = (
            f"{key!r} is {spelled(value):.40}, not a boolean: name the good and the bad value, as "
            f"in --label '{key}: {_meanings(value)}'"
        )
        raise InvalidRecordError("E209", reason)
    return value


_OPPOSITES = (
    *(("1", "0"), ("1", "-1"), ("1.0", "0.0"), ("yes", "no"), ("true", "false"), ("good", "bad")),
    *(("up", "down"), ("like", "dislike"), ("positive", "negative"), ("accept", "reject")),
)


def _meanings(value: Any) -> str:
    """Return an example for ``--label`` with the value of the row."""
    own = spelled(value).strip("'\"")
    for pair in _OPPOSITES:
        if own.casefold() in pair:
            good, bad = (own if one == own.casefold() else _as(own, one) for one in pair)
            return f"{good}=good {bad}=bad"
    return f"{own:.20}=good …=bad"


def _as(like: str, word: str) -> str:
    """Return a word in the case of another one."""
    return word.upper() if like.isupper() else word.title() if like.istitle() else word


_QUESTIONS = ("instruction", "question", "query", "input", "prompt")


def claims_demonstration(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row is read as a demonstration."""
    return settings.demonstrations and can_be_imitated(view)


def can_be_imitated(view: RowView) -> bool:
    """Return whether a row has a completion, or a chat, or a question and one answer."""
    return "completion" in view or _chat_name(view) is not None or _answer(view) is not None


def read_demonstration(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse a completion, or all answers of a chat.

    Raises:
        InvalidRecordError: Every error in the row.
    """
    if "completion" in view:
        answered = read_answers(view, ("completion",))
        completions = tuple(Completion(DEMONSTRATION, own, c) for c, own in answered.parts)
        prompt, tools = answered.prompt, answered.tools
        return ParsedRow("completion", "demonstration", prompt, completions, tools)
    if (name := _answer(view)) is not None:
        answered = read_answers(view, (name,))
        ((context, answer),) = answered.parts
        answers = (Completion(DEMONSTRATION, answer, context),)
        return ParsedRow("instruction", "demonstration", answered.prompt, answers, answered.tools)
    name = _chat_name(view) or _CHATS[0]
    value = view.take(name)
    if not isinstance(value, list):
        raise view.wrong(name, "a list of messages")
    turns, answer = conversations.split_demonstration(value, view.key(name))
    completions = (Completion(DEMONSTRATION, answer, ()),)
    prompt = with_system(view, turns)
    return ParsedRow("chat", "demonstration", prompt, completions, read_tools(view))


def _answer(view: RowView) -> str | None:
    """Return the name of the only answer to a question that is a string."""
    if not any(isinstance(view.peek(name), str) for name in _QUESTIONS):
        return None
    found = [name for name in ANSWERS if isinstance(view.peek(name), str)]
    return found[0] if len(found) == 1 else None


def _chat_name(view: RowView) -> str | None:
    return next((name for name in _CHATS if name in view), None)
