"""Answers to imitate, with nothing to compare them with."""

from logratio.data import conversations
from logratio.data.formats.answers import read_answers
from logratio.data.formats.catalogue import ANSWERS
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.questions import read_tools, with_system
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import View
from logratio.data.records import DEMONSTRATION, Completion

_QUESTIONS = ("instruction", "question", "query", "input", "prompt")
_CHATS = ("messages", "conversations")


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether a row has a completion, or a chat, or a question and an answer."""
    return settings.demonstrations and can_be_imitated(view)


def can_be_imitated(view: View) -> bool:
    """Say whether a row that is nothing else is an answer to imitate."""
    return "completion" in view or _chat(view) is not None or _answer(view) is not None


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read a completion, or all answers of a chat.

    Raises:
        InvalidRecordError: Whatever is wrong with it.
    """
    if "completion" in view:
        answered = read_answers(view, ("completion",))
        completions = tuple(Completion(DEMONSTRATION, own, c) for c, own in answered.parts)
        prompt, tools = answered.prompt, answered.tools
        return Meaning("completion", "demonstration", prompt, completions, tools)
    if (name := _answer(view)) is not None:
        answered = read_answers(view, (name,))
        ((context, answer),) = answered.parts
        said = (Completion(DEMONSTRATION, answer, context),)
        return Meaning("instruction", "demonstration", answered.prompt, said, answered.tools)
    name = _chat(view) or _CHATS[0]
    value = view.take(name)
    if not isinstance(value, list):
        raise view.wrong(name, "a list of messages")
    turns, answer = conversations.split_demonstration(value, view.key(name))
    completions = (Completion(DEMONSTRATION, answer, ()),)
    prompt = with_system(view, turns)
    return Meaning("chat", "demonstration", prompt, completions, read_tools(view))


def _answer(view: View) -> str | None:
    """Find the one answer of a question that is no list of turns."""
    if not any(isinstance(view.peek(name), str) for name in _QUESTIONS):
        return None
    found = [name for name in ANSWERS if isinstance(view.peek(name), str)]
    return found[0] if len(found) == 1 else None


def _chat(view: View) -> str | None:
    return next((name for name in _CHATS if name in view), None)
