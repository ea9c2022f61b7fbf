"""Two outputs and a label that names the better one; its meaning is known or given by --label."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from logratio.data.formats.catalogue import LABELS
from logratio.data.formats.labels import STAR, TIE, Label, Vote, advice, is_set, spelled
from logratio.data.formats.responses import Answered, ParsedRow, pair, read_answers, read_turns
from logratio.data.formats.row import RowView
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.values import marked_scores
from logratio.data.readers.rows import Row
from logratio.data.records import InvalidRecordError


@dataclass(frozen=True, slots=True)
class Published:
    """A public dataset with a label, recognised by its columns; its card defines the label.

    Attributes:
        keys: Columns that every such row has.
        label: The meaning of the label's values.
    """

    keys: frozenset[str]
    label: Label


_TURNS = "arena-55k"
_ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
_SIGNED = {"<0": "{0}1", ">0": "{0}2", "0": TIE}
_ARENA = dict.fromkeys(("tie", "tie (bothbad)", "tie (both bad)", "both_bad"), TIE)


def _signed(key: str, stem: str) -> Label:
    """Build a label whose negative values favour the first output, positive ones the second."""
    return Label(key, {value: meaning.format(stem) for value, meaning in _SIGNED.items()})


def _arena(stem: str, marks: str) -> Label:
    named = {f"model_{model}": f"{stem}_{mark}" for model, mark in zip("ab", marks, strict=True)}
    return Label("winner", named | _ARENA)


PUBLISHED = {
    "shp": Published(
        frozenset(("human_ref_A", "human_ref_B")),
        Label("labels", {"1": "human_ref_A", "0": "human_ref_B"}),
    ),
    "helpsteer3": Published(
        frozenset(("context", "response1", "response2", "overall_preference")),
        _signed("overall_preference", "response"),
    ),
    "helpsteer2": Published(
        frozenset(("prompt", "response_1", "response_2", "preference_strength")),
        _signed("preference_strength", "response_"),
    ),
    "ppe": Published(
        frozenset(("prompt", "response_1", "response_2", "model_a", "model_b", "winner")),
        _arena("response", "12"),
    ),
    "arena-chat": Published(
        frozenset(("conversation_a", "conversation_b", "model_a", "model_b", "winner")),
        _arena("conversation", "ab"),
    ),
    _TURNS: Published(
        frozenset(("prompt", "response_a", "response_b", *_ONE_HOT)),
        Label("winner_*", {"model_a": "response_a", "model_b": "response_b", "tie": TIE}),
    ),
}
"""Datasets whose label needs no flag."""

SIGNS = frozenset((*LABELS, "human_ref_A", "preference_strength", *_ONE_HOT))
_OUTPUT = re.compile(r"(?P<stem>.+?)[ _-]?(?P<mark>[12ABab01]|left|right)")
_MARKS = (("1", "2"), ("A", "B"), ("a", "b"), ("0", "1"), ("left", "right"))
_LABEL = re.compile(
    r"(?i)prefer|winner|better|best|choice|chosen|label|vote|verdict|comparison|pairwise"
)
_NO_OUTPUTS = {
    *("score", "rank", "rating", "reward", "id", "annotator", "model", "label", "winner"),
    *("tokens", "quotes", "chosen", "rejected", "score_chosen", "turn"),
}


def claims(view: RowView, settings: FormatSettings) -> bool:
    """Return whether a row has two outputs and a label with a usual name."""
    if _applies_to(view, settings.parsed_label) or published(view):
        return True
    return bool(_named_label(view)) and bool(outputs(view))


def might_claim(view: RowView) -> bool:
    """Return whether a row has two outputs and a label of any name; asked if no family matches."""
    return bool(outputs(view)) and bool(_label(view))


def read(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse the two outputs, the better one first.

    Raises:
        InvalidRecordError: E209 if the label's meaning is unknown, E212 for a value without a
            meaning, R310 for a tie.
    """
    label = settings.parsed_label
    if label and _applies_to(view, label):
        return _pair("ab", view, label, settings)
    name = published(view)
    if name is None:
        raise _unknown_label(view, settings)
    return _pair(name, view, PUBLISHED[name].label, settings)


def _pair(name: str, view: RowView, label: Label, settings: FormatSettings) -> ParsedRow:
    names = order(view, label)
    parsed_row = pair(name, _answered(view, names, settings))
    sides = zip(parsed_row.completions, marked_scores(view, names), strict=True)
    return replace(parsed_row, completions=tuple(replace(s, score=score) for s, score in sides))


def _answered(view: RowView, names: tuple[str, str], settings: FormatSettings) -> Answered:
    turns = read_turns(view, names, settings) if published(view) == _TURNS else None
    return turns or read_answers(view, names)


def published(view: RowView) -> str | None:
    """Return the name of the public dataset that a row comes from, or None."""
    return next((n for n, known in PUBLISHED.items() if all(map(view.has, known.keys))), None)


def outputs(view: RowView) -> tuple[str, str] | None:
    """Find two names of answers that differ only in their last letter, number or side."""
    stems: dict[str, dict[str, str]] = {}
    for name in view.names():
        match = _OUTPUT.fullmatch(name)
        if match and isinstance(view.peek(name), str | list | dict):
            stem = match["stem"].rstrip("_- ")
            if stem.lower() not in _NO_OUTPUTS:
                stems.setdefault(stem, {})[match["mark"]] = name
    for marks in stems.values():
        for first, second in _MARKS:
            if first in marks and second in marks:
                return marks[first], marks[second]
    return None


def explain_unknown_label(rows: Sequence[Row], settings: FormatSettings) -> str | None:
    """Explain which ``--label`` flags fit the values of a label in some rows.

    Returns:
        A sentence with the flags, each of which was tried on the rows. None if the rows do not
        share two outputs and a label.
    """
    views = [RowView(row, settings.columns) for row in rows]
    found = {(outputs(view), _label(view)) for view in views}
    ((names, label),) = found if len(found) == 1 else ((None, None),)
    if names is None or label is None:
        return None
    return _sentence(views, rows, names, label, settings)


def order(view: RowView, label: Label) -> tuple[str, str]:
    """Evaluate the label: return the name of the better answer, then that of the worse.

    Raises:
        InvalidRecordError: E212 for a label that does not choose between two answers, or a value
            without a meaning; R310 for a tie.
    """
    answers = label.answers()
    if len(answers) != 2:
        reason = f"the label chooses between {len(answers)} answers, but a pair has two"
        raise InvalidRecordError("E212", reason)
    value = _value(view, label)
    meaning = label.meaning(value)
    key, shown = view.key(label.key), f"{spelled(value):.40}"
    if meaning == TIE:
        for name in answers:
            view.take(name)
        raise InvalidRecordError("R310", f"{key!r} is {shown}: a tie")
    if meaning not in answers:
        known = ", ".join(label.meanings)
        reason = f"{key!r} is {shown}, but --label only defines {known}"
        raise InvalidRecordError("E212", reason)
    return (answers[0], answers[1]) if meaning == answers[0] else (answers[1], answers[0])


def _value(view: RowView, label: Label) -> object:
    """Return a label's value; for one-hot columns, the value that the set column represents."""
    if STAR not in label.key:
        return view.take(label.key)
    columns = label.columns(view.every())
    found = {name: is_set(view.peek(name)) for name in columns}
    wrong = [name for name, state in found.items() if state is None]
    if wrong:
        reason = f"{wrong[0]!r} is {spelled(view.peek(wrong[0])):.40}, neither 0 nor 1"
        raise InvalidRecordError("E212", reason)
    for name in columns:
        view.note(name)
    chosen = [name for name, state in found.items() if state]
    if len(chosen) != 1:
        reason = f"{len(chosen)} of the columns {label.key} are set, but exactly one should be"
        raise InvalidRecordError("E212", reason)
    return columns[chosen[0]]


def _sentence(
    views: Sequence[RowView],
    rows: Sequence[Row],
    names: tuple[str, str],
    label: str,
    settings: FormatSettings,
) -> str:
    """Describe which flags could explain a label, after trying each on the rows."""
    votes = [_seen(view, label) for view in views]
    return advice(names, label, votes, lambda flag: _fault(rows, replace(settings, label=flag)))


def _seen(view: RowView, label: str) -> Vote:
    if STAR not in label:
        return view.peek(label)
    columns = Label(label, {}).columns(view.every())
    return next((part for name, part in columns.items() if is_set(view.peek(name))), "")


def _fault(rows: Sequence[Row], settings: FormatSettings) -> str | None:
    """Return the first error that is not just a tie or an empty answer, or None."""
    for row in rows:
        try:
            read(RowView(row, settings.columns), settings)
        except InvalidRecordError as error:
            if error.code.startswith("E"):
                return str(error)
    return None


def _applies_to(view: RowView, label: Label | None) -> bool:
    """Return whether the row has the label and the answers that ``--label`` names."""
    if label is None or not label.answers():
        return False
    is_there = bool(label.columns(view.every())) if STAR in label.key else label.key in view
    return is_there and all(map(view.has, label.answers()))


def _named_label(view: RowView) -> str | None:
    return next((n for n in LABELS if isinstance(view.peek(n), str | int | float | list)), None)


def _label(view: RowView) -> str | None:
    """Find the label: a usual name, else one-hot columns, else the only name that matches."""
    if (named := _named_label(view)) or (named := _one_hot(view)):
        return named
    outs = outputs(view) or ()
    sounding = [
        name
        for name in view.names()
        if _LABEL.search(name)
        and name not in outs
        and isinstance(view.peek(name), str | int | float | list)
    ]
    return sounding[0] if len(sounding) == 1 else None


def _one_hot(view: RowView) -> str | None:
    """Find columns with a common prefix of which exactly one is set."""
    groups: dict[str, list[str]] = {}
    for name in view.names():
        if _LABEL.match(name) and "_" in name and is_set(view.peek(name)) is not None:
            groups.setdefault(name.split("_")[0] + "_", []).append(name)
    for start, names in groups.items():
        if len(names) > 1 and sum(bool(is_set(view.peek(name))) for name in names) == 1:
            return start + STAR
    return None


def _unknown_label(view: RowView, settings: FormatSettings) -> InvalidRecordError:
    label, given = _label(view), settings.parsed_label
    if given and given.answers():
        return InvalidRecordError("E209", _missing_key(view, given))
    names = outputs(view)
    if names is None or label is None:
        reason = (
            "the row needs a label for its two outputs: --label 'KEY: VALUE=OUTPUT VALUE=OUTPUT'"
        )
        return InvalidRecordError("E209", reason)
    return InvalidRecordError("E209", _sentence([view], [view.row], names, label, settings))


def _missing_key(view: RowView, label: Label) -> str:
    """Name the key of ``--label`` that the row lacks, and the most similar key of the row."""
    there = view.names()
    wanted = [*([] if STAR in label.key else [label.key]), *label.answers()]
    missing = next((name for name in wanted if name not in there), label.key)
    by_case = {name.casefold(): name for name in there}
    near = get_close_matches(missing.casefold(), by_case, 1, 0.6)
    hint = f": did you mean {by_case[near[0]]!r}?" if near else ""
    return f"--label names {missing!r}, but the row has no such key{hint}"
