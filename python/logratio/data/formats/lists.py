"""Several answers, each with a rank or a score."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logratio.data.formats import labelled
from logratio.data.formats.catalogue import LISTED, SINGLY, THUMBS, VALUES
from logratio.data.formats.responses import ParsedRow, combine, read_answers
from logratio.data.formats.row import RowView, Shape
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.values import MARKED_SCORES, as_score, is_storable
from logratio.data.records import CANDIDATE, Completion, InvalidRecordError, Omitted, Text

_SOUNDS = re.compile(r"(?i)(?:^|[\W_])(?:scores?|ratings?|ranks?|rewards?|grades?)(?:$|[\W_])")
_DEEP = 3  # levels of nested objects that are searched


def scores_in(item: object, before: str = "", deep: int = _DEEP) -> Iterator[str]:
    """Yield the keys of an answer that may be scores, with dots into nested objects."""
    if not isinstance(item, Mapping) or not deep:
        return
    for key, value in item.items():
        if isinstance(value, Mapping):
            yield from scores_in(value, f"{before}{key}.", deep - 1)
        elif _SOUNDS.search(str(key)) and as_score(value) is not None:
            yield f"{before}{key}"


def score_at(item: Any, name: str) -> object:
    """Return the value at a key, with dots into objects; a key that contains the dots wins."""
    if not isinstance(item, Mapping):
        return None
    if name in item:
        return item[name]
    key, dot, rest = name.partition(".")
    return score_at(item.get(key), rest) if dot else None


def named(items: Sequence[Any], name: str, key: str) -> list[float | int]:
    """Return the score of every answer under the key of ``--score``.

    Raises:
        InvalidRecordError: E212 if an answer has none.
    """
    numbers = []
    for place, item in enumerate(items, 1):
        number = as_score(score_at(item, name))
        if number is None:
            known = ", ".join(scores_in(item))
            there = f"; its scores are {known}" if known else ""
            reason = f"answer {place} of {key!r} has no number {name!r}{there}"
            raise InvalidRecordError("E212", reason)
        numbers.append(number)
    return numbers


def others(view: RowView, items: Sequence[Any], used: str) -> tuple[str, ...]:
    """Return W525 if another score could also rank the answers, with both names and the flag."""
    lists = (name for name in view.names() if _is_scores(view.peek(name), len(items), name))
    inside: Iterable[str] = scores_in(items[0])
    rest = [name for name in dict.fromkeys((*inside, *lists)) if name != used]
    if not rest:
        return ()
    text = f"ranked by {used!r}; --score NAME ranks by another: {', '.join(rest)}"
    return (Omitted("W525", text),)


def _is_scores(value: object, count: int, name: str) -> bool:
    is_list = isinstance(value, list) and len(value) == count and bool(_SOUNDS.search(name))
    return is_list and all(as_score(item) is not None for item in value)  # type: ignore[attr-defined]


SIGNS = frozenset((*LISTED, *SINGLY, "text"))
MOST = 256
"""Most answers in a list that becomes pairs: the number of pairs grows quadratically."""

_ITEM_ANSWERS = ("completion", "answer", "response", "text", "output", "content", "messages")
_ITEM_VALUES = ("rank", "score", "overall_score", "reward")
_RANKS = ("rank", "ranks")  # lower is better


@dataclass(frozen=True, slots=True)
class Rated:
    """Answers of a list and their values.

    Attributes:
        answers: The answers by their names in errors.
        values: The value of each answer; larger is better.
        sort: The name of the rank or score.
        is_binary: Whether the values were booleans rather than numbers.
        warnings: Codes of the row's warnings.
    """

    answers: Mapping[str, Any]
    values: tuple[float, ...]
    sort: str
    is_binary: bool
    warnings: tuple[str, ...]

    @property
    def is_rank(self) -> bool:
        """Whether lower numbers were better in the row."""
        return _is_rank(self.sort)


def claims(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row has a list of answers and a number for each."""
    if _is_text_score(view):
        return True
    name = _listed(view)
    if name is None:
        return False
    first = view.peek(name)[0]
    if isinstance(first, dict) and any(key in first for key in _ITEM_VALUES):
        return True
    return _scores_name(view, name, settings.score) is not None or any(scores_in(first))


def read(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse all answers and their ranks or scores.

    Raises:
        InvalidRecordError: E212 for a rank or score that is missing or not a finite number.
    """
    rated = read_rated(view, settings)
    shapes = [_shape(answer, name) for name, answer in rated.answers.items()]
    answered = combine(view, rated.answers, shapes)
    completions = candidates(answered.parts, rated.values, is_rank=rated.is_rank)
    form = "ranked" if rated.is_rank else "scored"
    return ParsedRow(
        "text-score" if _is_text_score(view) else form,
        "group",
        answered.prompt,
        completions,
        answered.tools,
        values=rated.values,
        warnings=rated.warnings,
        is_binary=rated.is_binary,
    )


def candidates(
    parts: Sequence[tuple[Text, Text]], values: Sequence[float], *, is_rank: bool = False
) -> tuple[Completion, ...]:
    """Build the answers of a list, each with its number from the row.

    Args:
        parts: Context and answer of each.
        values: The value of each; larger is better.
        is_rank: Whether the row has ranks, the values with the opposite sign.
    """
    return tuple(
        Completion(CANDIDATE, answer, context, rank=-value)
        if is_rank
        else Completion(CANDIDATE, answer, context, score=value)
        for (context, answer), value in zip(parts, values, strict=True)
    )


def read_rated(view: RowView, settings: FormatSettings) -> Rated:
    """Parse the answers of a list, of any shape, and their values.

    Raises:
        InvalidRecordError: As `read`.
    """
    name = "text" if _is_text_score(view) else _listed(view)
    if name is None:
        raise InvalidRecordError("E201", f"the key {view.key(LISTED[0])!r} is missing")
    items = view.take(name)
    key = view.key(name)
    numbers_name = _scores_name(view, name, settings.score)
    if numbers_name is not None and (
        numbers_name == settings.score or not _carries_value(items[0])
    ):
        numbers = view.take(numbers_name)
        if not isinstance(numbers, list) or len(numbers) != len(items):
            reason = f"{key!r} has {len(items)} answers, but {view.key(numbers_name)!r} does not"
            raise InvalidRecordError("E212", reason)
        answers, sort = [_answer_of(item) for item in items], numbers_name
    elif settings.score is not None:
        answers, sort = [_answer_of(item) for item in items], settings.score
        numbers = named(items, sort, key)
    else:
        answers, numbers, sort = _carried(items, key)
    _leave(view, name, items, sort)
    values, is_binary = values_of(numbers, sort)
    return Rated(
        {f"answer {number} of {key!r}": answer for number, answer in enumerate(answers, 1)},
        values,
        sort,
        is_binary,
        () if settings.score else others(view, items, sort),
    )


def values_of(numbers: Sequence[object], sort: str) -> tuple[tuple[float, ...], bool]:
    """Convert ranks, scores or booleans to values; larger is better.

    Returns:
        The values, and whether they were booleans.

    Raises:
        InvalidRecordError: E212 for other values.
    """
    if all(isinstance(number, bool) for number in numbers):
        return tuple(float(bool(number)) for number in numbers), True
    return tuple(_number(number, sort, _is_rank(sort)) for number in numbers), False


def _is_rank(sort: str) -> bool:
    return sort.rpartition(".")[2].casefold() in _RANKS


def _is_text_score(view: RowView) -> bool:
    text, score = view.peek("text"), view.peek("score")
    return isinstance(text, list) and isinstance(score, list) and bool(text)


def _listed(view: RowView) -> str | None:
    """Find the list of answers; rows merged by `--group-by` hold it under the name of one."""
    named = (name for name in LISTED if isinstance(view.peek(name), list) and view.peek(name))
    return next(named, None) or next((n for n in SINGLY if _is_several(view.peek(n))), None)


def _is_several(value: object) -> bool:
    """Return whether a list holds answers; a list of objects is one chat instead."""
    if not isinstance(value, list) or not value:
        return False
    return any(all(isinstance(item, kind) for item in value) for kind in (str, list))


def _scores_name(view: RowView, listed: str, score: str | None) -> str | None:
    """Find the list of scores for the answers, or of boolean labels in merged rows."""
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
    """Parse answers that each hold their rank or score."""
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
    """Return the key of the answer in an item that is not itself a message."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return None
    return next((name for name in _ITEM_ANSWERS if item.get(name) is not None), None)


def _leave(view: RowView, name: str, items: Sequence[Any], sort: str) -> None:
    """Record the keys of the items that are not read."""
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
    if not is_storable(number):
        reason = f"a {name!r} is {value!s:.40}, not a finite number (a float32)"
        raise InvalidRecordError("E212", reason)
    return -number if is_rank else number


_ALL = "scores"
SIGNS_SCORED = frozenset((_ALL, *(name for names in MARKED_SCORES for name in names)))
_NUMBERED = re.compile(r"response_([1-9]\d*)")


def claims_scored(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row has answers with a score each, and no label."""
    if labelled.claims(view, settings):
        return False
    if _numbered(view):
        return True
    return _scores(view) is not None and not labelled.might_claim(view)


def read_scored(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse all answers and their scores.

    Raises:
        InvalidRecordError: E212 for a score that is not a number, or another number of scores than
            answers, and every other error in the row.
    """
    if names := _numbered(view):
        # The answers were sampled from `prompt`; the row may also have a bare question.
        view.settle("prompt")
        return _meaning(view, "best-of-k", names, *_one_each(view, names))
    outputs, scores = labelled.outputs(view), _scores(view)
    if outputs is None or scores is None:
        known = ", ".join(f"`{one}` and `{two}`" for one, two in MARKED_SCORES)
        raise InvalidRecordError("E201", f"the row needs two answers with scores under {known}")
    values = []
    for name in scores:
        value = as_score(view.take(name))
        if value is None:
            reason = f"{view.key(name)!r} is {view.peek(name)!s:.40}, not a number"
            raise InvalidRecordError("E212", reason)
        values.append(float(value))
    return _meaning(view, "rated", outputs, values, is_binary=False)


def _meaning(
    view: RowView, form: str, names: Sequence[str], values: Sequence[float], is_binary: bool
) -> ParsedRow:
    answered = read_answers(view, names)
    return ParsedRow(
        form,
        "group",
        answered.prompt,
        candidates(answered.parts, values),
        answered.tools,
        values=tuple(values),
        is_binary=is_binary,
    )


def _numbered(view: RowView) -> list[str]:
    """Find `response_1`, `response_2` and so on, if the row has a list of scores."""
    if not isinstance(view.peek(_ALL), list):
        return []
    numbers = sorted(int(found[1]) for name in view.every() if (found := _NUMBERED.fullmatch(name)))
    return [f"response_{number}" for number in numbers] if numbers[:2] == [1, 2] else []


def _one_each(view: RowView, names: Sequence[str]) -> tuple[tuple[float, ...], bool]:
    """Return the values of the answers, one score each."""
    scores = view.take(_ALL)
    is_whole = names[-1] == f"response_{len(names)}"
    if not is_whole or len(scores) != len(names):
        there = f"{len(names)} answers, up to {view.key(names[-1])!r}"
        reason = f"the row has {there}, but {view.key(_ALL)!r} has {len(scores)}"
        raise InvalidRecordError("E212", reason)
    return values_of(scores, _ALL)


def _scores(view: RowView) -> tuple[str, str] | None:
    """Find the scores whose names end like those of the two answers."""
    names = labelled.outputs(view)
    if names is None:
        return None
    marks = tuple(name[-1] for name in names)
    fitting = (pair for pair in MARKED_SCORES if tuple(name[-1] for name in pair) == marks)
    return next((pair for pair in fitting if all(map(view.has, pair))), None)
