"""The meaning of a label's values, and the flags that define it."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from logratio.errors import LogratioError

TIE, GOOD, BAD = "tie", "good", "bad"

STAR = "*"
"""In a label's key, matches the label's value: ``winner_*`` matches ``winner_model_a``."""

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})")
_BOUND = re.compile(rf"(?P<sign><=|>=|<|>)(?P<at>{_NUMBER})")
_SET, _UNSET = {"1", "true"}, {"0", "false", ""}


class FormatSettingsError(LogratioError, ValueError):
    """Invalid or contradictory format settings."""


@dataclass(frozen=True, slots=True)
class Label:
    """The meaning of a label's values.

    Attributes:
        key: The key of the label. With a star, as ``winner_*``, the label is one-hot: in each row,
            one of the matching keys is set (1 or true), and the part that matches the star is the
            value.
        meanings: For each value, as text: the key of the better answer, ``tie``, or, for a single
            completion, ``good`` or ``bad``. A value may be a range of numbers: ``-3..-1``, ``<0``,
            ``>=2``.

    Example:
        >>> Label.parse("winner: A=answer_1 B=answer_2").meaning("B")
        'answer_2'
    """

    key: str
    meanings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Label":
        """Parse ``"preference: 1=output_1 2=output_2"``; quote words that contain spaces.

        Raises:
            FormatSettingsError: The text has another form, or ranges overlap.
        """
        wanted = "write it as 'preference: 1=output_1 2=output_2'"
        key, colon, rest = text.partition(":")
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise FormatSettingsError(f"--label {text!r} cannot be parsed: {error}") from None
        pairs = [word.rpartition("=") for word in words]
        is_read = colon and key.strip() and pairs and all(v and m for v, _, m in pairs)
        if not is_read or key.count(STAR) > 1:
            raise FormatSettingsError(f"--label {text!r} cannot be parsed: {wanted}")
        meanings: dict[str, str] = {}
        for value, _, meaning in pairs:
            if meanings.setdefault(_respelled(value), meaning) != meaning:
                raise FormatSettingsError(f"--label {text!r} gives {value} two meanings")
        _check_ranges(text, meanings)
        return cls(key.strip(), meanings)

    def to_flag(self) -> str:
        """Return the text that `parse` reads as this label."""
        words = (f"{shlex.quote(v)}={shlex.quote(m)}" for v, m in self.meanings.items())
        return f"{self.key}: {' '.join(words)}"

    def answers(self) -> tuple[str, ...]:
        """Return the keys of the answers that the label chooses between."""
        ours = (TIE, GOOD, BAD)
        return tuple(dict.fromkeys(m for m in self.meanings.values() if m not in ours))

    def is_thumb(self) -> bool:
        """Return whether the label rates a single completion as good or bad."""
        return not self.answers() and bool({GOOD, BAD} & set(self.meanings.values()))

    def meaning(self, value: Any) -> str | None:
        """Return the meaning of a value, or None.

        An exact value takes precedence over a range, and a range over the value in another letter
        case. A list without a meaning holds votes: the result is their majority, or a tie.
        """
        found = self._of(spelled(value))
        if found is not None or not isinstance(value, list) or not value:
            return found
        votes = [self.meaning(vote) for vote in value]
        return None if None in votes else _majority(vote for vote in votes if vote is not None)

    def columns(self, names: Iterable[str]) -> dict[str, str]:
        """Return the one-hot columns among some names, each with its value."""
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
    """Format a label's value as settings spell it: 1 and 1.0 are ``1``, true is ``true``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return str(value)


def _respelled(value: str) -> str:
    """Format a list that the user typed as `spelled` does."""
    try:
        return spelled(json.loads(value)) if value.startswith("[") else value
    except ValueError:
        return value


def is_set(value: Any) -> bool | None:
    """Return whether a one-hot column is set; None for a value other than true or false."""
    word = "" if value is None else spelled(value).strip().casefold()
    word = word.removesuffix(".0")
    return True if word in _SET else False if word in _UNSET else None


def as_number(value: str) -> float | None:
    """Parse a finite number; None for other text."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@lru_cache(maxsize=1024)
def span(word: str) -> tuple[float, bool, float, bool] | None:
    """Parse a range: its lower bound, whether it is included, its upper bound, whether included."""
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
    """Refuse empty ranges, and ranges that give a number two meanings."""
    ranges = [(word, found, m) for word, m in meanings.items() if (found := span(word))]
    for word, (low, _, high, _), _ in ranges:
        if low > high:
            raise FormatSettingsError(f"--label {text!r}: the range {word} is empty")
    for index, (word, found, meaning) in enumerate(ranges):
        for other, there, another in ranges[:index]:
            if meaning != another and _meet(found, there):
                raise FormatSettingsError(f"--label {text!r}: {other} and {word} overlap")


def _meet(one: tuple[float, bool, float, bool], other: tuple[float, bool, float, bool]) -> bool:
    low, is_open = max((one[0], not one[1]), (other[0], not other[1]))
    high, is_closed = min((one[2], one[3]), (other[2], other[3]))
    return low < high or (low == high and is_closed and not is_open)


def _majority(votes: Iterable[str]) -> str:
    (first, most), *rest = Counter(votes).most_common(2)
    return TIE if rest and rest[0][1] == most else first


def _folded(value: str) -> str:
    return value.strip().casefold()


Vote = Any
"""A label's value in one row."""
Fault = Callable[[Label], str | None]
"""Returns why rows cannot be read with a label, or None if all can."""
Words = dict[str, str]
"""A meaning for each value."""

_SHOWN = 4  # most values of a label in a message
_NAMED = ("model", "assistant", "response", "answer", "output", "option", "completion", "candidate")
_FIRST = {"first": 0, "left": 0, "second": 1, "right": 1}
_OPPOSITE = {"left": "right", "right": "left", "first": "second", "second": "first"}
_TIES = {"equal", "same", "draw", "both", "bothbad", "bothgood", "neither", "none", "equallygood"}
_SIGNED = re.compile(r"\W*(?P<one>\w+?)\s*(?P<sign>[<>=]+)\s*(?P<other>\w+)\W*")


def advice(names: tuple[str, str], key: str, votes: Sequence[Vote], fault: Fault) -> str:
    """Suggest flags for a label whose meaning is unknown.

    Args:
        names: The keys of the outputs.
        key: The key of the label; with a star, one-hot columns.
        votes: The label's values, one per row.
        fault: Tries a label on the rows.

    Returns:
        A sentence with flags that fit the values.
    """
    first, second = names
    counted = Counter(spelled(vote) for vote in votes)
    seen = ", ".join(f"{value:.40}" for value, _ in counted.most_common(_SHOWN))
    about = f"`{first}` and `{second}` with `{key}` = {seen}"
    carried = _carried(names, votes)
    if carried is not None:
        flag, reason = _tried(key, carried, fault)
        if reason is None:
            return f"{about}: the values name the better one. Confirm it with {flag}"
        return f"{about}: {flag} fits the values, but rows cannot be read with it: {reason}"
    tried = [_tried(key, words, fault) for words in _forms(names, votes)]
    forms = [flag for flag, reason in tried if reason is None] or [flag for flag, _ in tried]
    if not forms:
        forms = [_flag(key, {"VALUE": first, "OTHER": second, "THIRD": TIE})]
    return (
        f"{about}: the values do not name the better output, and datasets differ. Look up their "
        f"meaning, then use {' or '.join(forms)}"
    )


def _flag(key: str, words: Words) -> str:
    """Return the flag, quoted for a shell."""
    pairs = " ".join(f"{_quoted(value)}={_quoted(name)}" for value, name in words.items())
    return f"--label {shlex.quote(f'{key}: {pairs}')}"


def _quoted(word: str) -> str:
    return f'"{word}"' if re.search(r"[\s']", word) else word


def _tried(key: str, words: Words, fault: Fault) -> tuple[str, str | None]:
    """Return a flag, and why it fails or None, after parsing it as the program will."""
    flag = _flag(key, words)
    try:
        label = Label.parse(shlex.split(flag)[1])
    except FormatSettingsError as error:
        return flag, str(error)
    return flag, fault(label)


def _carried(names: tuple[str, str], votes: Sequence[Vote]) -> Words | None:
    """Return the meanings that the values name themselves; None if one of them names none."""
    values = list(dict.fromkeys(_singly(votes)))
    if hot := _positions(names, values):
        return hot
    texts = [spelled(value) for value in values]
    if any(as_number(text) is not None for text in texts):
        return _counted(names, texts)
    words: Words = {}
    for text in texts:
        meaning = _named(names, text)
        if meaning is None:
            return None
        words[text] = meaning
    words = _completed(names, words)
    words = {value: m for m in (*names, TIE) for value, of in words.items() if of == m}
    return words if set(names) <= set(words.values()) else None


def _singly(votes: Sequence[Vote]) -> Iterator[Any]:
    """Yield hashable values; a list of votes one by one, a one-hot list as a tuple."""
    for vote in votes:
        if isinstance(vote, list) and not _is_hot(vote):
            yield from map(spelled, vote)
        else:
            yield tuple(vote) if isinstance(vote, list) else spelled(vote)


def _is_hot(vote: list[Any]) -> bool:
    return len(vote) in (2, 3) and sorted(map(spelled, vote)) in (["0", "1"], ["0", "0", "1"])


def _positions(names: tuple[str, str], values: Sequence[Any]) -> Words | None:
    """Map one-hot lists by the position of the 1: first output, second output, tie."""
    if not values or not all(isinstance(value, tuple) for value in values):
        return None
    (width, *others) = {len(value) for value in values}
    if others:
        return None
    meanings = (*names, TIE)
    unit = [[int(place == at) for place in range(width)] for at in range(width)]
    return {spelled(unit[at]): meanings[at] for at in range(width)}


def _counted(names: tuple[str, str], texts: Sequence[str]) -> Words | None:
    """Map numbers that end the outputs' names, if exactly these were seen."""
    marks = tuple(map(_mark, names))
    if not all(mark.isdigit() for mark in marks) or set(texts) != set(marks):
        return None
    return dict(zip(marks, names, strict=True))


def _named(names: tuple[str, str], text: str) -> str | None:
    """Return the output that a value names, or a tie, or None."""
    if (match := _SIGNED.fullmatch(text)) and _side(names, match["one"]) is not None:
        sides = _side(names, match["one"]), _side(names, match["other"])
        if sides not in ((0, 1), (1, 0)):
            return None
        better = {">": 0, "<": 1}.get(match["sign"][0])
        return TIE if better is None else names[sides[better] or 0]
    plain = _plain(text)
    if plain.startswith("tie") or plain in _TIES:
        return TIE
    side = _side(names, text)
    return None if side is None else names[side]


def _side(names: tuple[str, str], text: str) -> int | None:
    """Return which of two outputs a word names, in any letter case: 0 or 1, or None."""
    plain = _plain(text)
    if plain in _FIRST:
        return _FIRST[plain]
    for side, name in enumerate(names):
        mark = _mark(name)
        spellings = {_plain(name), mark, *(f"{stem}{mark}" for stem in _NAMED)}
        if plain in spellings:
            return side
    return None


def _completed(names: tuple[str, str], words: Words) -> Words:
    """Add the value of an output that was not seen, if swapping the mark of the other gives it."""
    for own, other in (names, reversed(names)):
        if own in words.values() and other not in words.values():
            for value in [value for value, meaning in words.items() if meaning == own]:
                swapped = _OPPOSITE.get(value) or _swapped(value, own, other)
                if swapped and _named(names, swapped) == other:
                    return {**words, swapped: other}
    return words


def _swapped(value: str, own: str, other: str) -> str | None:
    """Swap the mark in one output's value for that of the other."""
    one, two = _mark(own), _mark(other)
    if one == two or len(one) > 1 or not value:
        return None
    table = {one: two, two: one, one.upper(): two.upper(), two.upper(): one.upper()}
    if _SIGNED.fullmatch(value):
        return "".join(table.get(letter, letter) for letter in value)
    last = max((value.rfind(mark) for mark in table), default=-1)
    return None if last < 0 else value[:last] + table[value[last]] + value[last + 1 :]


def _forms(names: tuple[str, str], votes: Sequence[Vote]) -> list[Words]:
    """List the possible meanings of the values."""
    texts = list(dict.fromkeys(map(spelled, _singly(votes))))
    numbers = [as_number(text) for text in texts]
    found: Iterable[Words]
    if texts and None not in numbers:
        found = _of_numbers(names, [number for number in numbers if number is not None], texts)
    elif set(texts) <= {"true", "false"}:
        found = _both_ways(names, ("true", "false"))
    elif len(texts) == 2:
        found = _both_ways(names, (texts[0], texts[1]))
    else:
        found = ()
    return list(found)


def _of_numbers(
    names: tuple[str, str], numbers: Sequence[float], texts: Sequence[str]
) -> Iterator[Words]:
    first, second = names
    if min(numbers) < 0:
        yield {"<0": first, ">0": second, "0": TIE}
        yield {">0": first, "<0": second, "0": TIE}
    elif set(texts) <= {"0", "1"}:
        yield from _both_ways(names, ("0", "1"))
        yield {"1": first, "2": second, "0": TIE}
    elif set(texts) <= {"0", "1", "2"}:
        yield {"1": first, "2": second} | ({"0": TIE} if "0" in texts else {})
        yield {"0": first, "1": second, "2": TIE}
    elif all(number.is_integer() for number in numbers):
        low, high = int(min(numbers)), int(max(numbers))
        middle = (low + high) // 2 if (low + high) % 2 == 0 else None
        below = middle - 1 if middle is not None else (low + high) // 2
        above = (middle if middle is not None else below) + 1
        tie = {} if middle is None else {str(middle): TIE}
        for one, two in (names, (second, first)):
            yield {f"{low}..{below}": one, f"{above}..{high}": two} | tie


def _both_ways(names: tuple[str, str], values: tuple[str, str]) -> Iterator[Words]:
    for one, two in (values, values[::-1]):
        yield {one: names[0], two: names[1]}


def _mark(name: str) -> str:
    """Return the end of an output's name: a letter, a digit, or a side."""
    plain = _plain(name)
    return next((side for side in ("left", "right") if plain.endswith(side)), plain[-1:])


def _plain(text: str) -> str:
    """Keep only letters and digits, in lower case."""
    return re.sub(r"[\W_]+", "", text).casefold()
