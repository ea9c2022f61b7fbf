"""One good answer, or some, against several worse ones: strings under `chosen` and `rejected`."""

from logratio.data.formats.answers import put_together
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import View
from logratio.data.records import CANDIDATE, Completion, InvalidRecordError

SIDES = ("chosen", "rejected")
SIGNS = frozenset(("rejected",))
_COUNTED = "num_correct"  # which RewardBench 2 has, and no list of steps
_STYLES = 3  # in which RM-Bench has each answer


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether `rejected` lists answers.

    Two lists could be steps, unless they are counted, or are three styles of an answer in a domain.
    """
    if not _is_strings(view.peek("rejected")) or view.has("first_diff") or view.has("error_steps"):
        return False
    chosen = view.peek("chosen")
    if not _is_strings(chosen):
        return isinstance(chosen, str)
    return view.has(_COUNTED) or _is_rm_bench(view)


def _is_rm_bench(view: View) -> bool:
    """Say whether a row has RM-Bench's keys and three answers a side, none of them on both."""
    sides = [view.peek(name) for name in SIDES]
    is_three = all(len(side) == _STYLES for side in sides)
    return is_three and isinstance(view.peek("domain"), str) and set(sides[0]).isdisjoint(sides[1])


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read the answers: each of `chosen` is better than each of `rejected`.

    Raises:
        InvalidRecordError: E203 where a side holds no strings; whatever else is wrong with it.
    """
    answers: dict[str, str] = {}
    values: list[float] = []
    for name, value in zip(SIDES, (1.0, 0.0), strict=True):
        side = view.take(name)
        side = [side] if isinstance(side, str) else side
        if not _is_strings(side):
            raise view.wrong(name, "a string or a list of strings")
        for place, text in enumerate(side, 1):
            answers[f"answer {place} of {view.key(name)!r}"] = text
            values.append(value)
    answered = put_together(view, answers, ["text"] * len(answers))
    if answered.main is None:
        raise InvalidRecordError("E201", f"the key {view.key('prompt')!r} is missing")
    completions = tuple(
        Completion(CANDIDATE, answer, context) for context, answer in answered.parts
    )
    return Meaning(
        "several",
        "group",
        answered.prompt,
        completions,
        answered.tools,
        values=tuple(values),
        is_sided=True,
    )


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
