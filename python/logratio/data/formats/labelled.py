"""Two outputs and a label that says which is better: its meaning has to be told."""

import re

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
_NO_OUTPUTS = {"score", "rank", "rating", "reward", "id", "annotator", "model", "label"}


def claims(view: View, settings: FormatSettings) -> bool:
    """Say whether a row has two outputs and a label."""
    label = settings.told
    if label and label.answers():
        return all(map(view.has, label.answers())) and label.key in view
    if view.has("human_ref_A") and view.has("human_ref_B"):
        return True
    return bool(_label(view)) and bool(outputs(view))


def read(view: View, settings: FormatSettings) -> Meaning:
    """Read the two outputs, the better one first.

    Raises:
        InvalidRecordError: E209 where the label's meaning was not told, E212 for a value that has
            none, R310 for a tie.
    """
    label = settings.told
    if label is None or not label.answers():
        if not (view.has("human_ref_A") and view.has("human_ref_B")):
            raise _untold(view)
        label = _SHP
    better, worse = _order(view, label)
    return pair("shp" if label is _SHP else "ab", read_answers(view, (better, worse)))


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


def suggestion(names: tuple[str, str], key: str, value: object) -> str:
    """Write the flag that would tell a label's meaning, were it the usual one."""
    first, second = names
    said = spelled(value)
    one, two = first[-1], second[-1]
    if ">" in said or "<" in said:
        one, two = f"{one}>{two}", f"{two}>{one}"
    elif said.startswith("model_"):
        one, two = f"model_{one}", f"model_{two}"
    elif said in ("0", "1") and (said == "0" or one not in "12"):
        one, two = "0", "1"
    return f"--label '{key}: {_quoted(one)}={_quoted(first)} {_quoted(two)}={_quoted(second)}'"


def _quoted(word: str) -> str:
    """Hold a word's blanks together inside a flag that stands in single quotes."""
    return f'"{word}"' if " " in word else word


def _label(view: View) -> str | None:
    return next((n for n in LABELS if isinstance(view.peek(n), str | int | float)), None)


def _untold(view: View) -> InvalidRecordError:
    names, label = outputs(view), _label(view)
    if names is None or label is None:
        reason = "a label of two outputs is wanted: --label 'KEY: VALUE=OUTPUT VALUE=OUTPUT'"
        return InvalidRecordError("E209", reason)
    keys = view.key(names[0]), view.key(names[1])
    value = view.peek(label)
    flag = suggestion(keys, view.key(label), value)
    reason = (
        f"`{keys[0]}` and `{keys[1]}` with `{view.key(label)}` = {spelled(value):.40}: which of "
        f"them that means differs from set to set. Say it, as in {flag}"
    )
    return InvalidRecordError("E209", reason)


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
