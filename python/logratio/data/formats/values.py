"""Numbers that a row gives for its answers: scores, margins and weights.

The ranks and scores of a list are read with its answers, in `lists`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from logratio.data.formats.catalogue import MARGIN, SIDE_SCORES, SINGLE_SCORES, VALUE_NAMES, WEIGHT
from logratio.data.formats.responses import ParsedRow
from logratio.data.formats.row import RowView
from logratio.data.records import PAIR_SIDES, Completion, InvalidRecordError

MARKED_SCORES = (("score_0", "score_1"), ("score_1", "score_2"), ("score_a", "score_b"),
                 ("score_A", "score_B"))  # fmt: skip
"""Names of the scores of two answers, whose names end in the same marks."""

_STRENGTHS = {"helpsteer2": "preference_strength", "helpsteer3": "overall_preference"}
"""Formats whose signed label also says how much better the better answer is."""

FLOAT32_MAX = 3.4028234663852886e38
"""The largest number that a store can hold."""

_LOWER = "W526"


def as_score(value: object) -> float | int | None:
    """Return a number, which may be written as a string; None for other values."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_storable(number: float) -> bool:
    """Return whether a number is finite, also as a float32."""
    return abs(number) <= FLOAT32_MAX


def with_values(view: RowView, parsed_row: ParsedRow) -> ParsedRow:
    """Add the numbers of a row to its completions.

    A pair may have a score for each side and a margin, unpaired feedback a score, and every row a
    weight. A score or a margin that is not a number remains unread.

    Args:
        view: The row.
        parsed_row: Its answers; those of a list already have their rank or score.

    Returns:
        The row with its numbers. If the chosen answer is scored lower than the rejected one, the
        pair has no margin, but the warning W526.

    Raises:
        InvalidRecordError: E212 if a weight is not a finite number of at least 0.
    """
    strength = _STRENGTHS.get(parsed_row.format)
    is_scored = parsed_row.kind == "pair" and parsed_row.completions[0].score is not None
    if strength is None and not is_scored and view.lacks(VALUE_NAMES):
        return parsed_row
    completions, warnings = parsed_row.completions, parsed_row.warnings
    if parsed_row.kind == "pair":
        chosen, rejected = _scored(view, *completions)
        margin, is_lower = _margin(view, strength, chosen.score, rejected.score)
        completions = (replace(chosen, margin=margin), rejected)
        warnings = (*warnings, _LOWER) if is_lower else warnings
    elif parsed_row.kind == "unpaired":
        completions = (replace(completions[0], score=_first_number(view, SINGLE_SCORES)),)
    if WEIGHT in view:
        weighted = zip(completions, _weights(view, len(completions)), strict=True)
        completions = tuple(replace(one, weight=weight) for one, weight in weighted)
    return replace(parsed_row, completions=completions, warnings=warnings)


def values_of_ids(view: RowView) -> ParsedRow:
    """Read the numbers of a pair of token ids, whose sides have no text; see `with_values`."""
    return with_values(view, ParsedRow("ids", "pair", "", PAIR_SIDES))


def marked_scores(view: RowView, names: Sequence[str]) -> tuple[float | None, ...]:
    """Return the scores of two answers under names with the same marks, or None for each.

    Args:
        view: The row.
        names: The names of the answers, as ``human_ref_A`` and ``human_ref_B``.
    """
    marks = {names[0][-1], names[1][-1]}
    for pair in MARKED_SCORES:
        found = {name[-1]: name for name in pair}
        if found.keys() == marks and all(map(view.has, pair)):
            return tuple(_first_number(view, [found[name[-1]]]) for name in names)
    return (None, None)


def _scored(view: RowView, chosen: Completion, rejected: Completion) -> tuple[Completion, ...]:
    """Add the scores of the sides: those under the first two names of which the row has one."""
    named = [pair for pair in SIDE_SCORES if pair[0] in view or pair[1] in view]
    if not named:
        return chosen, rejected
    names = next((pair for pair in named if any(map(view.has, pair))), named[0])
    sides = zip((chosen, rejected), names, strict=True)
    return tuple(replace(side, score=_first_number(view, [name])) for side, name in sides)


def _margin(
    view: RowView, strength: str | None, chosen: float | None, rejected: float | None
) -> tuple[float | None, bool]:
    """Return the margin of a pair, if any, and whether the chosen answer is scored lower."""
    margin = _first_number(view, [MARGIN])
    if margin is None and strength is not None:
        signed = _first_number(view, [strength])
        margin = None if signed is None else abs(signed)
    if margin is None and chosen is not None and rejected is not None:
        margin = chosen - rejected
    if margin is None or not is_storable(margin):
        return None, False
    return (None, True) if margin < 0 else (margin, False)


def _first_number(view: RowView, names: Iterable[str]) -> float | None:
    """Read the first finite number under some names; None if there is none."""
    for name in filter(view.__contains__, names):
        value = view.peek(name)
        number = None if _is_absent(value) else as_score(value)
        if number is not None and is_storable(number):
            view.note(name)
            return float(number)
        if _is_absent(value):
            view.note(name)
    return None


def _weights(view: RowView, count: int) -> list[float | None]:
    """Read the weight of every completion: one number for all, or a list, as of merged rows."""
    given, key = view.peek(WEIGHT), view.key(WEIGHT)
    view.note(WEIGHT)
    values = given if isinstance(given, list) else [given] * count
    if len(values) != count:
        raise InvalidRecordError("E212", f"{key!r} has {len(values)} weights for {count} answers")
    return [_weight(value, key) for value in values]


def _weight(value: object, key: str) -> float | None:
    if _is_absent(value):
        return None
    number = as_score(value)
    if number is None or not is_storable(number) or number < 0:
        reason = f"a {key!r} is {value!s:.40}, not a finite number of at least 0"
        raise InvalidRecordError("E212", reason)
    return float(number)


def _is_absent(value: object) -> bool:
    """Return whether there is no number: null, an empty cell of CSV, or the NaN of pandas."""
    return value is None or value == "" or value != value
