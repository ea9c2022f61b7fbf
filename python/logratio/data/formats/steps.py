"""Step-by-step solutions: right steps that are not trained, then a good and a bad step, or several.

The question becomes a user turn, and the steps begin the assistant's turn. A step does not end its
turn, so no EOS follows it.
"""

from collections.abc import Sequence

from logratio.data.formats import lists
from logratio.data.formats.prompts import Question, find_main, read_question
from logratio.data.formats.responses import ParsedRow
from logratio.data.formats.row import RowView
from logratio.data.formats.settings import FormatSettings
from logratio.data.records import CHOSEN, REJECTED, Completion, InvalidRecordError

_BEFORE = "initial_reason_steps"
SIGNS = frozenset((_BEFORE, "first_diff", "error_steps"))


def claims(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row has steps to compare."""
    if not _is_pair(view):
        return view.has(_BEFORE) and lists.claims(view, settings)
    if view.has(_BEFORE):
        return True
    sides = view.peek("chosen"), view.peek("rejected")
    is_list = all(isinstance(side, list) and side for side in sides)
    is_marked = view.has("first_diff") or view.has("error_steps")
    return is_list and is_marked and all(isinstance(step, str) for side in sides for step in side)


def read(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse the common steps, and those that are compared.

    Raises:
        InvalidRecordError: E214 if the solutions differ too early, R301 if a side has no step left,
            E212 for an invalid score.
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
    return ParsedRow(name, "pair", question.turns(), completions, question.tools, ends=False)


def _is_pair(view: RowView) -> bool:
    return view.has("chosen") and view.has("rejected")


def _read_list(view: RowView, question: Question, settings: FormatSettings) -> ParsedRow:
    """Parse several candidates for the next step, with their scores."""
    before, rated = view.text(_BEFORE), lists.read_rated(view, settings)
    for name, step in rated.answers.items():
        if not isinstance(step, str):
            raise InvalidRecordError("E203", f"{name} is not a string, but steps are strings")
    if before:
        before += _seam(view, before, next(iter(rated.answers.values())))
    return ParsedRow(
        "step-list",
        "group",
        question.turns(),
        lists.candidates(
            [(before, step) for step in rated.answers.values()],
            rated.values,
            is_rank=rated.is_rank,
        ),
        question.tools,
        ends=False,
        values=rated.values,
        warnings=rated.warnings,
        is_binary=rated.is_binary,
    )


def _seam(view: RowView, before: str, step: str) -> str:
    """Return the separator between the previous steps and a step.

    `full_chosen` shows it, if the row has it. Otherwise the separator is empty after white space or
    a colon ("Step 3:") and before white space, and else a line break.
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


def _first_difference(view: RowView) -> tuple[str, str, str]:
    good, bad = _steps(view, "chosen"), _steps(view, "rejected")
    at = _place(view, good, bad)
    if good[:at] != bad[:at]:
        raise InvalidRecordError("E214", f"the solutions differ before step {at + 1}")
    for name, steps in (("chosen", good), ("rejected", bad)):
        if at >= len(steps):
            raise InvalidRecordError("R301", f"{view.key(name)!r} has no step {at + 1}")
    before = "".join(step if step.endswith("\n") else f"{step}\n" for step in good[:at])
    return before, good[at], bad[at]


def _steps(view: RowView, name: str) -> list[str]:
    steps = view.take(name)
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise view.wrong(name, "a list of strings")
    return steps


def _place(view: RowView, good: Sequence[str], bad: Sequence[str]) -> int:
    """Return the index, from 0, of the first step in which two solutions differ."""
    if view.has("first_diff"):
        place = view.take("first_diff")
        if isinstance(place, int) and not isinstance(place, bool) and place >= 0:
            return place
        raise InvalidRecordError(
            "E214", f"{view.key('first_diff')!r} is not the number of a step, from 0"
        )
    both = zip(good, bad, strict=False)
    alike = min(len(good), len(bad))
    return next((i for i, (left, right) in enumerate(both) if left != right), alike)
