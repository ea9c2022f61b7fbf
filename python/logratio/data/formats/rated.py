"""Two answers with a score each, as WebGPT's comparisons have them: the higher one is better."""

from logratio.data.formats import labelled
from logratio.data.formats.answers import read_answers
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.scores import as_score
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import View
from logratio.data.records import CANDIDATE, Completion, InvalidRecordError

SCORES = (("score_0", "score_1"), ("score_1", "score_2"), ("score_a", "score_b"),
          ("score_A", "score_B"))  # fmt: skip
SIGNS = frozenset(name for names in SCORES for name in names)


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether a row has two answers and a score for each, and no label that judges them."""
    if _scores(view) is None or labelled.might_claim(view):
        return False
    return not labelled.claims(view, settings)


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read both answers and their scores.

    Raises:
        InvalidRecordError: E212 for a score that is no number; whatever else is wrong with it.
    """
    names, scores = labelled.outputs(view), _scores(view)
    if names is None or scores is None:
        known = ", ".join(f"`{one}` and `{two}`" for one, two in SCORES)
        raise InvalidRecordError("E201", f"two answers are wanted, with scores under {known}")
    values = []
    for name in scores:
        value = as_score(view.take(name))
        if value is None:
            reason = f"{view.key(name)!r} is {view.peek(name)!s:.40}, no number"
            raise InvalidRecordError("E212", reason)
        values.append(float(value))
    answered = read_answers(view, names)
    completions = tuple(
        Completion(CANDIDATE, answer, context) for context, answer in answered.parts
    )
    return Meaning(
        "rated", "group", answered.prompt, completions, answered.tools, values=tuple(values)
    )


def _scores(view: View) -> tuple[str, str] | None:
    """Find the scores whose names end as those of the two answers do."""
    names = labelled.outputs(view)
    if names is None:
        return None
    marks = tuple(name[-1] for name in names)
    fitting = (pair for pair in SCORES if tuple(name[-1] for name in pair) == marks)
    return next((pair for pair in fitting if all(map(view.has, pair))), None)
