"""Solutions step by step: right steps that do not count, then a good and a bad step, or several.

The question becomes a user's turn and the steps the beginning of the assistant's: a step does not
end its turn, so no end-of-text token follows it.
"""

from collections.abc import Sequence

from logratio.data.formats import lists
from logratio.data.formats.prompts import Question, find_main, read_question
from logratio.data.formats.responses import Meaning
from logratio.data.formats.row import View
from logratio.data.formats.settings import FormatSettings
from logratio.data.records import CANDIDATE, CHOSEN, REJECTED, Completion, InvalidRecordError

_BEFORE = "initial_reason_steps"
SIGNS = frozenset((_BEFORE, "first_diff", "error_steps"))


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether a row has steps of which one is better than another."""
    if not _is_pair(view):
        return view.has(_BEFORE) and lists.claims(view, settings)
    if view.has(_BEFORE):
        return True
    sides = view.peek("chosen"), view.peek("rejected")
    is_list = all(isinstance(side, list) and side for side in sides)
    told = view.has("first_diff") or view.has("error_steps")
    return is_list and told and all(isinstance(step, str) for side in sides for step in side)


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read the steps that both share, and the two that differ.

    Raises:
        InvalidRecordError: E214 where the steps do not fit together, R301 where a side has no step
            of its own, E212 for a score of several steps that cannot be read.
    """
    main = find_main(view)
    if main is None:
        view.take("prompt")
    view.chats({}, main)
    question = read_question(view, str(main))
    if view.has(_BEFORE) and not _is_pair(view):
        return _read_list(view, question, settings)
    if view.has(_BEFORE) and settings.format != "prmbench":
        name = "step-dpo"
        before, good, bad = (view.text(key) for key in (_BEFORE, "chosen", "rejected"))
        before += _seam(view, before, good) if before else ""
    else:
        name = "prmbench"
        before, good, bad = _first_difference(view)
    completions = (Completion(CHOSEN, good, before), Completion(REJECTED, bad, before))
    return Meaning(name, "pair", question.turns(), completions, question.tools, ends=False)


def _is_pair(view: View) -> bool:
    return view.has("chosen") and view.has("rejected")


def _read_list(view: View, question: Question, settings: FormatSettings) -> Meaning:
    """Read several steps that could come next, and how good each is."""
    before, rated = view.text(_BEFORE), lists.read_rated(view, settings)
    for name, step in rated.answers.items():
        if not isinstance(step, str):
            raise InvalidRecordError("E203", f"{name} is no string, as a step is")
    if before:
        before += _seam(view, before, next(iter(rated.answers.values())))
    return Meaning(
        "step-list",
        "group",
        question.turns(),
        tuple(Completion(CANDIDATE, step, before) for step in rated.answers.values()),
        question.tools,
        ends=False,
        values=rated.values,
        warnings=rated.warnings,
        is_sided=rated.is_sided,
    )


def _seam(view: View, before: str, step: str) -> str:
    """Find what stands between the steps before and a step: the whole solution shows it.

    Where there is none to look at, they follow each other as they are if white space or a colon
    ("Step 3:") keeps them apart, else on a line each.
    """
    whole = view.peek("full_chosen")
    if isinstance(whole, str) and whole.startswith(before):
        rest = whole[len(before) :]
        between = rest[: len(rest) - len(rest.lstrip())]
        if rest.startswith(step):
            return ""
        if rest[len(between) :].startswith(step):
            return between
    apart = before[-1].isspace() or before.endswith(":") or step[:1].isspace()
    return "" if apart else "\n"


def _first_difference(view: View) -> tuple[str, str, str]:
    good, bad = _steps(view, "chosen"), _steps(view, "rejected")
    at = _place(view, good, bad)
    if good[:at] != bad[:at]:
        raise InvalidRecordError("E214", f"the solutions differ before step {at + 1}")
    for name, steps in (("chosen", good), ("rejected", bad)):
        if at >= len(steps):
            raise InvalidRecordError("R301", f"{view.key(name)!r} has no step {at + 1}")
    before = "".join(step if step.endswith("\n") else f"{step}\n" for step in good[:at])
    return before, good[at], bad[at]


def _steps(view: View, name: str) -> list[str]:
    steps = view.take(name)
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise view.wrong(name, "a list of strings")
    return steps


def _place(view: View, good: Sequence[str], bad: Sequence[str]) -> int:
    """Find the number, from 0, of the step in which two solutions part."""
    if view.has("first_diff"):
        place = view.take("first_diff")
        if isinstance(place, int) and not isinstance(place, bool) and place >= 0:
            return place
        raise InvalidRecordError("E214", f"{view.key('first_diff')!r} is no step's number, from 0")
    both = zip(good, bad, strict=False)
    alike = min(len(good), len(bad))
    return next((i for i, (left, right) in enumerate(both) if left != right), alike)
