"""The number that ranks a list's answers, and the others that could."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from logratio.data.codes import Omitted
from logratio.data.formats.view import View
from logratio.data.records import InvalidRecordError

_SOUNDS = re.compile(r"(?i)(?:^|[\W_])(?:scores?|ratings?|ranks?|rewards?|grades?)(?:$|[\W_])")
_DEEP = 3  # objects in objects that are looked into


def scores_in(item: object, before: str = "", deep: int = _DEEP) -> Iterator[str]:
    """Name the numbers of an answer that sound like a score; a dot goes into an object."""
    if not isinstance(item, Mapping) or not deep:
        return
    for key, value in item.items():
        if isinstance(value, Mapping):
            yield from scores_in(value, f"{before}{key}.", deep - 1)
        elif _SOUNDS.search(str(key)) and as_score(value) is not None:
            yield f"{before}{key}"


def as_score(value: object) -> float | int | None:
    """Return a number, which may be written as a string; None for anything else."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def score_at(item: Any, name: str) -> object:
    """Return what stands under a name, which may have dots: keys that hold dots come first."""
    if not isinstance(item, Mapping):
        return None
    if name in item:
        return item[name]
    key, dot, rest = name.partition(".")
    return score_at(item.get(key), rest) if dot else None


def named(items: Sequence[Any], name: str, key: str) -> list[float | int]:
    """Read the score that ``--score`` names of every answer.

    Raises:
        InvalidRecordError: E212 where an answer has none.
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


def others(view: View, items: Sequence[Any], used: str) -> tuple[str, ...]:
    """Warn where another score could rank the answers (W525), naming both and the flag."""
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
