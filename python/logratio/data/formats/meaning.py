"""What a row says, before it is known what a user wants of it."""

from dataclasses import dataclass

from logratio.data.formats.answers import Answered
from logratio.data.formats.settings import Kind
from logratio.data.records import CHOSEN, REJECTED, Completion, Message, Text


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
