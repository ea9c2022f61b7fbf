"""Two outputs and a label that says which is better: its meaning has to be told."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from logratio.data.containers import Row
from logratio.data.formats.answers import read_answers
from logratio.data.formats.catalogue import LABELS
from logratio.data.formats.meaning import Meaning, pair
from logratio.data.formats.settings import TIE, FormatSettings, Label, spelled
from logratio.data.formats.view import View
from logratio.data.records import InvalidRecordError

SIGNS = frozenset((*LABELS, "human_ref_A"))
_SHP = Label("labels", {"1": "human_ref_A", "0": "human_ref_B"})
_OUTPUT = re.compile(r"(?P<stem>.+?)[ _]?(?P<mark>[12ABab01])")
_MARKS = (("1", "2"), ("A", "B"), ("a", "b"), ("0", "1"))
_SHOWN = 4  # values of a label
_NO_OUTPUTS = {"score", "rank", "rating", "reward", "id", "annotator", "model", "label"}


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether a row has two outputs and a label."""
    if _speaks_of(view, settings.told) or _is_shp(view):
        return True
    return bool(_label(view)) and bool(outputs(view))


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read the two outputs, the better one first.

    Raises:
        InvalidRecordError: E209 where the label's meaning was not told, E212 for a value that has
            none, R310 for a tie.
    """
    label = settings.told
    if label and _speaks_of(view, label):
        return pair("ab", read_answers(view, _order(view, label)))
    if not _is_shp(view):
        raise _untold(view)
    return pair("shp", read_answers(view, _order(view, _SHP)))


def outputs(view: View) -> tuple[str, str] | None:
    """Find two names that differ in their last letter or number only, and hold answers."""
    stems: dict[str, dict[str, str]] = {}
    for name in view.names():
        match = _OUTPUT.fullmatch(name)
        if match and isinstance(view.peek(name), str | list | dict):
            stem = match["stem"].rstrip("_ ")
            if stem.lower() not in _NO_OUTPUTS:
                stems.setdefault(stem, {})[match["mark"]] = name
    for marks in stems.values():
        for first, second in _MARKS:
            if first in marks and second in marks:
                return marks[first], marks[second]
    return None


def suggestion(names: tuple[str, str], key: str, values: Collection[str]) -> str:
    """Write the flag that would tell a label's meaning, were it the usual one.

    Args:
        names: The keys of the outputs.
        key: The label's.
        values: Of the label, as far as they were seen.
    """
    first, second = names
    one, two = first[-1], second[-1]
    if any(sign in value for value in values for sign in "<>"):
        one, two = f"{one}>{two}", f"{two}>{one}"
    elif any(value.startswith("model_") for value in values):
        one, two = f"model_{one}", f"model_{two}"
    elif "2" in values:
        one, two = "1", "2"
    elif "0" in values or ("1" in values and one not in "12"):
        one, two = "0", "1"
    meanings = {one: first, two: second}
    ties = [value for value in values if value not in meanings and _is_tie(value)]
    meanings |= dict.fromkeys(ties, TIE)
    words = " ".join(f"{_quoted(value)}={_quoted(name)}" for value, name in meanings.items())
    return f"--label '{key}: {words}'"


def untold(rows: Sequence[Row], settings: FormatSettings) -> str | None:
    """Say what is not known of a label, looking at all its values.

    Returns:
        A sentence with the flag that tells it; None where the rows have not the same two outputs
        and label.
    """
    views = [View(row, settings.columns) for row in rows]
    found = {(outputs(view), _label(view)) for view in views}
    ((names, label),) = found if len(found) == 1 else ((None, None),)
    if names is None or label is None:
        return None
    values = Counter(spelled(view.peek(label)) for view in views)
    return _sentence(views[0], names, label, values)


def _sentence(view: View, names: tuple[str, str], label: str, values: Counter[str]) -> str:
    first, second = keys = view.key(names[0]), view.key(names[1])
    key = view.key(label)
    seen = ", ".join(f"{value:.40}" for value, _ in values.most_common(_SHOWN))
    flag = suggestion(keys, key, values)
    return (
        f"`{first}` and `{second}` with `{key}` = {seen}: which of them that means differs from "
        f"set to set. Say it, as in {flag}"
    )


def _is_tie(value: str) -> bool:
    return value == "0" or value.lower().startswith("tie")


def _quoted(word: str) -> str:
    """Hold a word's blanks together inside a flag that stands in single quotes."""
    return f'"{word}"' if " " in word else word


def _speaks_of(view: View, label: Label | None) -> bool:
    """Say whether a label that was told is of this row: others may stand beside it in a set."""
    if label is None or label.key not in view or not label.answers():
        return False
    return all(map(view.has, label.answers()))


def _is_shp(view: View) -> bool:
    return view.has("human_ref_A") and view.has("human_ref_B")


def _label(view: View) -> str | None:
    return next((n for n in LABELS if isinstance(view.peek(n), str | int | float)), None)


def _untold(view: View) -> InvalidRecordError:
    names, label = outputs(view), _label(view)
    if names is None or label is None:
        reason = "a label of two outputs is wanted: --label 'KEY: VALUE=OUTPUT VALUE=OUTPUT'"
        return InvalidRecordError("E209", reason)
    values = Counter([spelled(view.peek(label))])
    return InvalidRecordError("E209", _sentence(view, names, label, values))


def _order(view: View, label: Label) -> tuple[str, str]:
    """Read the label: which name is the better answer's, which the worse one's."""
    answers = label.answers()
    if len(answers) != 2:
        reason = f"the label chooses between {len(answers)} answers, and a pair has two"
        raise InvalidRecordError("E212", reason)
    value = spelled(view.take(label.key))
    meaning = label.meanings.get(value)
    if meaning == TIE:
        for name in answers:
            view.take(name)
        raise InvalidRecordError("R310", f"{view.key(label.key)!r} is {value:.40}: a tie")
    if meaning not in answers:
        told = ", ".join(label.meanings)
        reason = f"{view.key(label.key)!r} is {value:.40}, and a meaning was told of {told} only"
        raise InvalidRecordError("E212", reason)
    return (answers[0], answers[1]) if meaning == answers[0] else (answers[1], answers[0])
