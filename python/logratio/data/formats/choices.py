"""What a row says, as the records that a user wants of it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from logratio.data import conversations
from logratio.data.formats.lists import MOST
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.settings import FormatSettings
from logratio.data.records import (
    CANDIDATE,
    CHOSEN,
    DEMONSTRATION,
    REJECTED,
    Completion,
    InvalidRecordError,
    PreferenceRecord,
    Source,
)

Chosen = tuple[list[PreferenceRecord], list[str]]
"""Records, and the codes of what was left out of them."""


def records_of(meaning: Meaning, source: Source, settings: FormatSettings) -> Chosen:
    """Make a row's records.

    Raises:
        InvalidRecordError: R301, R302, R310 where nothing is left of it, E206 where unpaired
            feedback would have to be imitated.
    """
    if settings.demonstrations:
        return [_demonstration(meaning, source)], []
    if meaning.kind != "group":
        for completion in meaning.completions:
            _check_not_empty(completion)
        if meaning.kind == "pair":
            _check_different(*meaning.completions)
        return [_record(meaning, meaning.completions, source)], []
    if len(meaning.values) == 1:
        reason = "the list has one answer, and nothing to compare it with"
        raise InvalidRecordError("R310", reason)
    if settings.lists == "groups":
        return _group(meaning, source)
    if settings.lists == "best_worst":
        values = meaning.values
        best, worst = values.index(max(values)), values.index(min(values))
        return _pairs(meaning, source, [(best, worst)])
    if len(meaning.values) > MOST:
        reason = f"a list of {len(meaning.values):,} answers makes too many pairs (most: {MOST})"
        raise InvalidRecordError("E212", f"{reason}: take --lists best_worst or groups")
    places: Iterable[tuple[int, int]] = combinations(range(len(meaning.values)), 2)
    if meaning.is_sided:
        places = ((a, b) for a, b in places if meaning.values[a] != meaning.values[b])
    return _pairs(meaning, source, list(places))


def is_empty(completion: Completion) -> bool:
    """Say whether a completion has no words that count."""
    answer = completion.answer
    words = answer if isinstance(answer, str) else conversations.words(answer)
    return not words.strip()


def _record(
    meaning: Meaning, completions: Sequence[Completion], source: Source
) -> PreferenceRecord:
    return PreferenceRecord(meaning.prompt, tuple(completions), source, meaning.tools, meaning.ends)


def _demonstration(meaning: Meaning, source: Source) -> PreferenceRecord:
    if meaning.kind == "unpaired":
        raise InvalidRecordError("E206", "a labelled row is no demonstration")
    best = meaning.values.index(max(meaning.values)) if meaning.values else 0
    best_one = meaning.completions[best]
    completion = Completion(DEMONSTRATION, best_one.answer, best_one.context)
    _check_not_empty(completion)
    return _record(meaning, [completion], source)


def _pairs(meaning: Meaning, source: Source, places: Sequence[tuple[int, int]]) -> Chosen:
    """Make a pair of each two places whose values differ."""
    records, left_out = [], []
    for first, second in places:
        gap = meaning.values[first] - meaning.values[second]
        better, worse = (first, second) if gap > 0 else (second, first)
        sides = [
            Completion(role, meaning.completions[place].answer, meaning.completions[place].context)
            for role, place in ((CHOSEN, better), (REJECTED, worse))
        ]
        fault = "R310" if gap == 0 else next(_faults(sides), None)
        if fault:
            left_out.append(fault)
        else:
            records.append(_record(meaning, sides, source))
    return _some(records, left_out)


def _faults(sides: Sequence[Completion]) -> Iterator[str]:
    if any(map(is_empty, sides)):
        yield "R301"
    if _said(sides[0]) == _said(sides[1]):
        yield "R302"


def _group(meaning: Meaning, source: Source) -> Chosen:
    """Make one group, best first; empty and repeated completions are left out."""
    order = sorted(range(len(meaning.values)), key=lambda place: -meaning.values[place])
    kept: list[int] = []
    left_out = []
    said = []
    for place in order:
        completion = meaning.completions[place]
        if is_empty(completion):
            left_out.append("R301")
        elif _said(completion) in said:
            left_out.append("R302")
        else:
            kept.append(place)
            said.append(_said(completion))
    values = tuple(meaning.values[place] for place in kept)
    if len(set(values)) < 2:
        return _some([], left_out or ["R310"])
    completions = tuple(meaning.completions[place] for place in kept)
    assert all(completion.role == CANDIDATE for completion in completions)
    record = PreferenceRecord(
        meaning.prompt, completions, source, meaning.tools, meaning.ends, values
    )
    return [record], left_out


def _some(records: list[PreferenceRecord], left_out: list[str]) -> Chosen:
    """Refuse a row of which nothing is left, for its most common reason."""
    if records:
        return records, left_out
    reasons = {
        "R310": "no answer of the list is better than another",
        "R301": "every pair of the list has an empty completion",
        "R302": "every pair of the list is identical",
    }
    code = max(reasons, key=left_out.count)
    raise InvalidRecordError(code, reasons[code])


def _said(completion: Completion) -> tuple[object, object]:
    answer = completion.answer
    return completion.context, answer if isinstance(answer, str) else conversations.ended(answer)


def _check_not_empty(completion: Completion) -> None:
    if is_empty(completion):
        raise InvalidRecordError("R301", f"the {completion.role} completion is empty")


def _check_different(chosen: Completion, rejected: Completion) -> None:
    if _said(chosen) == _said(rejected):
        raise InvalidRecordError("R302", "the chosen and the rejected completion are identical")
