"""What the values of a label mean: exact values, ranges of numbers, votes, one-hot columns."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from logratio.errors import LogratioError

TIE, GOOD, BAD = "tie", "good", "bad"

STAR = "*"
"""In a label's key: the part of a column's name that is the label's value, as ``winner_*``."""

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})")
_BOUND = re.compile(rf"(?P<sign><=|>=|<|>)(?P<at>{_NUMBER})")
_SET, _UNSET = {"1", "true"}, {"0", "false", ""}


class FormatSettingsError(LogratioError, ValueError):
    """Settings that cannot be followed."""


@dataclass(frozen=True, slots=True)
class Label:
    """What the values of a label mean.

    Attributes:
        key: The key of the label. With a star, as ``winner_*``, the label is one-hot: of the keys
            that fit, one is set (1 or true) in each row, and what stands for the star is the value.
        meanings: For each value, as text: the key of the better answer, ``tie``, or, for one
            completion alone, ``good`` or ``bad``. A value may be a range of numbers: ``-3..-1``,
            ``<0``, ``>=2``.
    """

    key: str
    meanings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Label":
        """Read ``"preference: 1=output_1 2=output_2"``; quotes hold blanks together.

        Raises:
            FormatSettingsError: The text has another shape, or ranges overlap.
        """
        wanted = "write it as 'preference: 1=output_1 2=output_2'"
        key, colon, rest = text.partition(":")
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise FormatSettingsError(f"the label {text!r} is not understood: {error}") from None
        pairs = [word.rpartition("=") for word in words]
        is_read = colon and key.strip() and pairs and all(v and m for v, _, m in pairs)
        if not is_read or key.count(STAR) > 1:
            raise FormatSettingsError(f"the label {text!r} is not understood: {wanted}")
        meanings: dict[str, str] = {}
        for value, _, meaning in pairs:
            if meanings.setdefault(_respelled(value), meaning) != meaning:
                raise FormatSettingsError(f"the label {text!r} gives {value} two meanings")
        _check_ranges(text, meanings)
        return cls(key.strip(), meanings)

    def answers(self) -> tuple[str, ...]:
        """Return the keys of the answers that it chooses between."""
        ours = (TIE, GOOD, BAD)
        return tuple(dict.fromkeys(m for m in self.meanings.values() if m not in ours))

    def is_thumb(self) -> bool:
        """Say whether it judges one completion alone."""
        return not self.answers() and bool({GOOD, BAD} & set(self.meanings.values()))

    def meaning(self, value: Any) -> str | None:
        """Return what a value means; None where it has no meaning.

        An exact value comes before a range, and that before the same value in other case. A list
        without a meaning of its own holds votes: the meaning that most of them have, or a tie.
        """
        found = self._of(spelled(value))
        if found is not None or not isinstance(value, list) or not value:
            return found
        votes = [self.meaning(vote) for vote in value]
        return None if None in votes else _majority(vote for vote in votes if vote is not None)

    def columns(self, names: Iterable[str]) -> dict[str, str]:
        """Return the one-hot columns among some names, each with the value that it stands for."""
        before, _, behind = self.key.partition(STAR)
        least = len(before) + len(behind)
        return {
            name: name[len(before) : len(name) - len(behind)]
            for name in names
            if name.startswith(before) and name.endswith(behind) and len(name) > least
        }

    def _of(self, value: str) -> str | None:
        if value in self.meanings:
            return self.meanings[value]
        number = as_number(value)
        if number is not None:
            ranges = ((word, meaning) for word, meaning in self.meanings.items() if span(word))
            return next((meaning for word, meaning in ranges if _holds(word, number)), None)
        alike = {m for v, m in self.meanings.items() if v.strip().casefold() == _folded(value)}
        return alike.pop() if len(alike) == 1 else None


def spelled(value: Any) -> str:
    """Write a label's value as settings spell it: 1 and 1.0 are ``1``, true is ``true``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return str(value)


def _respelled(value: str) -> str:
    """Write a list as `spelled` does, however it was typed."""
    try:
        return spelled(json.loads(value)) if value.startswith("[") else value
    except ValueError:
        return value


def is_set(value: Any) -> bool | None:
    """Say whether a one-hot column is set; None where its value is neither set nor not set."""
    word = "" if value is None else spelled(value).strip().casefold()
    word = word.removesuffix(".0")
    return True if word in _SET else False if word in _UNSET else None


def as_number(value: str) -> float | None:
    """Read a finite number; None where a text is no such number."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@lru_cache(maxsize=1024)
def span(word: str) -> tuple[float, bool, float, bool] | None:
    """Read a range: its least number, whether that belongs to it, and the same of its largest."""
    if match := _RANGE.fullmatch(word):
        return float(match["low"]), True, float(match["high"]), True
    if match := _BOUND.fullmatch(word):
        at, is_in = float(match["at"]), match["sign"].endswith("=")
        return (-math.inf, True, at, is_in) if "<" in match["sign"] else (at, is_in, math.inf, True)
    return None


def _holds(word: str, number: float) -> bool:
    found = span(word)
    if found is None:
        return False
    low, has_low, high, has_high = found
    return (low <= number if has_low else low < number) and (
        number <= high if has_high else number < high
    )


def _check_ranges(text: str, meanings: Mapping[str, str]) -> None:
    """Refuse ranges that are empty, or that give a number two meanings."""
    ranges = [(word, found, m) for word, m in meanings.items() if (found := span(word))]
    for word, (low, _, high, _), _ in ranges:
        if low > high:
            raise FormatSettingsError(f"the label {text!r}: the range {word} is empty")
    for index, (word, found, meaning) in enumerate(ranges):
        for other, there, another in ranges[:index]:
            if meaning != another and _meet(found, there):
                raise FormatSettingsError(f"the label {text!r}: {other} and {word} overlap")


def _meet(one: tuple[float, bool, float, bool], other: tuple[float, bool, float, bool]) -> bool:
    low, is_open = max((one[0], not one[1]), (other[0], not other[1]))
    high, is_closed = min((one[2], one[3]), (other[2], other[3]))
    return low < high or (low == high and is_closed and not is_open)


def _majority(votes: Iterable[str]) -> str:
    (first, most), *rest = Counter(votes).most_common(2)
    return TIE if rest and rest[0][1] == most else first


def _folded(value: str) -> str:
    return value.strip().casefold()
