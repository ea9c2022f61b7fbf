"""Answers under names of their own with a score each: the higher one is better.

WebGPT's comparisons have two, each with its score; PPE's best of k has many, and a list of scores.
"""

import re
from collections.abc import Sequence

from logratio.data.formats import labelled
from logratio.data.formats.answers import read_answers
from logratio.data.formats.lists import values_of
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.scores import as_score
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import View
from logratio.data.records import CANDIDATE, Completion, InvalidRecordError

SCORES = (("score_0", "score_1"), ("score_1", "score_2"), ("score_a", "score_b"),
          ("score_A", "score_B"))  # fmt: skip
_ALL = "scores"
SIGNS = frozenset((_ALL, *(name for names in SCORES for name in names)))
_NUMBERED = re.compile(r"response_([1-9]\d*)")


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether a row has answers and a score for each, and no label that judges them."""
    if labelled.claims(view, settings):
        return False
    if _numbered(view):
        return True
    return _scores(view) is not None and not labelled.might_claim(view)


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read all answers and their scores.

    Raises:
        InvalidRecordError: E212 for a score that is no number, or where there are not as many as
            answers; whatever else is wrong with it.
    """
    if names := _numbered(view):
        view.settle(
            "prompt"
        )  # from which the answers were sampled; the row may also have a bare question
        return _meaning(view, "best-of-k", names, *_listed(view, names))
    outputs, scores = labelled.outputs(view), _scores(view)
    if outputs is None or scores is None:
        known = ", ".join(f"`{one}` and `{two}`" for one, two in SCORES)
        raise InvalidRecordError("E201", f"two answers are wanted, with scores under {known}")
    values = []
    for name in scores:
        value = as_score(view.take(name))
        if value is None:
            reason = f"{view.key(name)!r} is {view.peek(name)!s:.40}, no number"
            raise InvalidRecordError("E212", reason)
        values.append(float(value))
    return _meaning(view, "rated", outputs, values, is_sided=False)


def _meaning(
    view: View, form: str, names: Sequence[str], values: Sequence[float], is_sided: bool
) -> Meaning:
    answered = read_answers(view, names)
    return Meaning(
        form,
        "group",
        answered.prompt,
        tuple(Completion(CANDIDATE, answer, context) for context, answer in answered.parts),
        answered.tools,
        values=tuple(values),
        is_sided=is_sided,
    )


def _numbered(view: View) -> list[str]:
    """Find `response_1`, `response_2` and so on, where the row has a list of scores."""
    if not isinstance(view.peek(_ALL), list):
        return []
    numbers = sorted(int(found[1]) for name in view.every() if (found := _NUMBERED.fullmatch(name)))
    return [f"response_{number}" for number in numbers] if numbers[:2] == [1, 2] else []


def _listed(view: View, names: Sequence[str]) -> tuple[tuple[float, ...], bool]:
    """Read one score for each answer."""
    scores = view.take(_ALL)
    is_whole = names[-1] == f"response_{len(names)}"
    if not is_whole or len(scores) != len(names):
        there = f"{len(names)} answers, up to {view.key(names[-1])!r}"
        reason = f"the row has {there}, and {view.key(_ALL)!r} has {len(scores)}"
        raise InvalidRecordError("E212", reason)
    return values_of(scores, _ALL)


def _scores(view: View) -> tuple[str, str] | None:
    """Find the scores whose names end as those of the two answers do."""
    names = labelled.outputs(view)
    if names is None:
        return None
    marks = tuple(name[-1] for name in names)
    fitting = (pair for pair in SCORES if tuple(name[-1] for name in pair) == marks)
    return next((pair for pair in fitting if all(map(view.has, pair))), None)
