"""Several answers, each with a rank or a score."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logratio.data.formats.answers import put_together
from logratio.data.formats.catalogue import LISTED, SINGLY, THUMBS, VALUES
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.scores import named, others, scores_in
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import Shape, View
from logratio.data.records import CANDIDATE, Completion, InvalidRecordError

SIGNS = frozenset((*LISTED, *SINGLY, "text"))
MOST = 256
"""Most answers in a list that becomes pairs: their number grows with its square."""

_ITEM_ANSWERS = ("completion", "answer", "response", "text", "output", "content", "messages")
_ITEM_VALUES = ("rank", "score", "overall_score", "reward")
_RANKS = ("rank", "ranks")  # where lower is better


@dataclass(frozen=True, slots=True)
class Rated:
    """Answers of a list, and how good each is.

    Attributes:
        answers: By the names that errors call them by.
        values: Larger is better.
        sort: The name of the rank or score.
        is_sided: Whether they are verdicts, true or false, and no numbers.
        warnings: Codes of what is to be counted of the row.
    """

    answers: Mapping[str, Any]
    values: tuple[float, ...]
    sort: str
    is_sided: bool
    warnings: tuple[str, ...]

    @property
    def is_rank(self) -> bool:
        """Whether a lower number was better in the row."""
        return _is_rank(self.sort)


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether a row has a list of answers, and a number for each."""
    if _is_text_score(view):
        return True
    name = _listed(view)
    if name is None:
        return False
    first = view.peek(name)[0]
    if isinstance(first, dict) and any(key in first for key in _ITEM_VALUES):
        return True
    return _beside(view, name, settings.score) is not None or any(scores_in(first))


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read every answer and how good it is.

    Raises:
        InvalidRecordError: E212 for a rank or score that is no finite number, or is missing.
    """
    rated = read_rated(view, settings)
    shapes = [_shape(answer, name) for name, answer in rated.answers.items()]
    answered = put_together(view, rated.answers, shapes)
    completions = tuple(
        Completion(CANDIDATE, answer, context) for context, answer in answered.parts
    )
    form = "ranked" if rated.is_rank else "scored"
    return Meaning(
        "text-score" if _is_text_score(view) else form,
        "group",
        answered.prompt,
        completions,
        answered.tools,
        values=rated.values,
        warnings=rated.warnings,
        is_sided=rated.is_sided,
    )


def read_rated(view: View, settings: FormatSettings) -> Rated:
    """Read the answers of a list, of whatever shape, and their numbers.

    Raises:
        InvalidRecordError: As `read`.
    """
    name = "text" if _is_text_score(view) else _listed(view)
    if name is None:
        raise InvalidRecordError("E201", f"the key {view.key(LISTED[0])!r} is missing")
    items = view.take(name)
    key = view.key(name)
    beside = _beside(view, name, settings.score)
    if beside is not None and (beside == settings.score or not _carries_value(items[0])):
        numbers = view.take(beside)
        if not isinstance(numbers, list) or len(numbers) != len(items):
            reason = f"{key!r} has {len(items)} answers, and {view.key(beside)!r} not as many"
            raise InvalidRecordError("E212", reason)
        answers, sort = [_answer_of(item) for item in items], beside
    elif settings.score is not None:
        answers, sort = [_answer_of(item) for item in items], settings.score
        numbers = named(items, sort, key)
    else:
        answers, numbers, sort = _carried(items, key)
    _leave(view, name, items, sort)
    values, is_sided = values_of(numbers, sort)
    return Rated(
        {f"answer {number} of {key!r}": answer for number, answer in enumerate(answers, 1)},
        values,
        sort,
        is_sided,
        () if settings.score else others(view, items, sort),
    )


def values_of(numbers: Sequence[object], sort: str) -> tuple[tuple[float, ...], bool]:
    """Read numbers, or verdicts that are all true or false: larger is better.

    Returns:
        Them, and whether they are verdicts.

    Raises:
        InvalidRecordError: E212 for anything else.
    """
    if all(isinstance(number, bool) for number in numbers):
        return tuple(float(bool(number)) for number in numbers), True
    return tuple(_number(number, sort, _is_rank(sort)) for number in numbers), False


def _is_rank(sort: str) -> bool:
    return sort.rpartition(".")[2].casefold() in _RANKS


def _is_text_score(view: View) -> bool:
    text, score = view.peek("text"), view.peek("score")
    return isinstance(text, list) and isinstance(score, list) and bool(text)


def _listed(view: View) -> str | None:
    """Find the answers; under the name of one, as rows that were put together have them."""
    named = (name for name in LISTED if isinstance(view.peek(name), list) and view.peek(name))
    return next(named, None) or next((n for n in SINGLY if _is_several(view.peek(n))), None)


def _is_several(value: object) -> bool:
    """Say whether a list holds answers: of objects it is one, a chat."""
    if not isinstance(value, list) or not value:
        return False
    return any(all(isinstance(item, kind) for item in value) for kind in (str, list))


def _beside(view: View, listed: str, score: str | None) -> str | None:
    """Find the list of numbers that scores the answers; of thumbs, where each answer had one."""
    if score is not None:
        return score if isinstance(view.peek(score), list) else None
    found = next((name for name in VALUES if isinstance(view.peek(name), list)), None)
    if found or listed in LISTED:
        return found
    return next((name for name in THUMBS if _is_verdicts(view.peek(name))), None)


def _is_verdicts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, bool) for item in value)


def _carries_value(item: object) -> bool:
    return isinstance(item, Mapping) and any(key in item for key in _ITEM_VALUES)


def _carried(items: Sequence[Any], key: str) -> tuple[list[Any], list[Any], str]:
    """Read answers that carry their own rank or score."""
    first = items[0]
    sort = next((name for name in _ITEM_VALUES if isinstance(first, dict) and name in first), None)
    if sort is None:
        flags = " or ".join(f"--score {name}" for name in scores_in(first))
        reason = f"the answers in {key!r} have no rank and no score"
        raise InvalidRecordError("E212", f"{reason}: choose {flags}" if flags else reason)
    for index, item in enumerate(items):
        if not isinstance(item, dict) or sort not in item:
            raise InvalidRecordError("E212", f"answer {index + 1} of {key!r} has no {sort!r}")
    return [_answer_of(item) for item in items], [item[sort] for item in items], sort


def _answer_of(item: Any) -> Any:
    key = _answer_key(item)
    return item if key is None else item[key]


def _answer_key(item: Any) -> str | None:
    """Find the key of the answer in an item that is none itself."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return None
    return next((name for name in _ITEM_ANSWERS if item.get(name) is not None), None)


def _leave(view: View, name: str, items: Sequence[Any], sort: str) -> None:
    """Note what of the items is not read."""
    for item in items:
        if key := _answer_key(item):
            view.leave(
                name,
                [
                    k
                    for k, v in item.items()
                    if k not in (key, sort, sort.split(".")[0]) and v is not None
                ],
            )


def _shape(answer: Any, name: str) -> Shape:
    if isinstance(answer, str):
        return "text"
    if isinstance(answer, dict):
        return "message"
    if isinstance(answer, list) and all(isinstance(turn, dict) for turn in answer):
        return "messages" if answer else "empty"
    known = ", ".join(_ITEM_ANSWERS)
    code = "E201" if answer is None else "E203"
    raise InvalidRecordError(code, f"{name} has no string or messages under one of {known}")


def _number(value: object, name: str, is_rank: bool) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRecordError("E212", f"a {name!r} is {value!s:.40}, no finite number")
    return -number if is_rank else number
