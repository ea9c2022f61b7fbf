"""Find the format of a row: each family of formats checks whether it can read the row."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache

from logratio.data import layouts
from logratio.data.formats import labelled, lists, pairs, steps, unpaired
from logratio.data.formats.catalogue import CATALOGUE, FORMATS, KNOWN_NAMES, Need, near_formats
from logratio.data.formats.prompts import BEFORE
from logratio.data.formats.responses import ParsedRow
from logratio.data.formats.row import RowView
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.rows import Row
from logratio.data.records import InvalidRecordError

_SIMILARITY = 0.8  # least ratio of difflib between two similar keys
_MARK = re.compile(r"(?:[\W_]|(?<=[a-z]))([0-9]+|[A-Z])$|[\W_]([a-z]|left|right)$")
_SYNONYMS = {
    "rating": "score",
    "ratings": "scores",
    **dict.fromkeys(("pref", "prefs"), "preference"),
    **dict.fromkeys(("good", "better", "preferred", "accepted", "positive", "winner"), "chosen"),
    **dict.fromkeys(("bad", "worse", "dispreferred", "negative", "loser"), "rejected"),
}
"""Words of keys, and the word of a format that they may mean; advice only, never read as such."""
_MOST = 64  # most keys of a row that are compared

Read = Callable[[Row, FormatSettings], object]
"""Reads a row, or raises `InvalidRecordError`."""


def renamed(row: Row, settings: FormatSettings, read: Read) -> str:
    """Suggest a ``--columns`` flag that makes a refused row readable.

    Args:
        row: The row.
        settings: The settings with which it was refused.
        read: Tries a row with other settings; only a flag that works is suggested.

    Returns:
        The end of a sentence, or "" if no key is similar enough.
    """
    for columns in _near(tuple(key for key, value in row.items() if value is not None)[:_MOST]):
        if columns.keys() & settings.columns.keys():
            continue
        mapping = ",".join(f"{name}={key}" for name, key in columns.items())
        flag = f"--columns {shlex.quote(mapping)}"
        try:
            read(row, replace(settings, columns={**settings.columns, **columns}))
        except InvalidRecordError as error:
            if error.code == "E209":  # what the label needs is in its reason
                return f"; with {flag}, {error.reason}"
            if error.code.startswith("E"):
                continue
        return f"; did you mean {flag}?"
    return ""


@lru_cache(maxsize=256)
def _near(keys: tuple[str, ...]) -> Sequence[Mapping[str, str]]:
    """List the column mappings that turn the keys into those of a format, shortest first."""
    found = []
    for known in CATALOGUE:
        columns = _columns(keys, known.needs)
        if columns and columns not in found:
            found.append(columns)
    return sorted(found, key=len)


def _columns(keys: Sequence[str], needs: Sequence[Need]) -> dict[str, str] | None:
    """Find a similar key for each missing name; None if one of them has none."""
    columns: dict[str, str] = {}
    for need in needs:
        if any(name in keys for name in need):
            continue
        rest = [key for key in keys if key not in columns.values()]
        match = next(((name, key) for name in need if (key := _nearest(name, rest))), None)
        if match is None:
            return None
        columns[match[0]] = match[1]
    return columns


def _nearest(name: str, keys: Sequence[str]) -> str | None:
    plain = {_plain(key): key for key in reversed(keys) if _may_mean(name, key)}
    if found := plain.get(_plain(name)):
        return found
    near = get_close_matches(_plain(name), plain, 1, _SIMILARITY)
    return plain[near[0]] if near else None


def _may_mean(name: str, key: str) -> bool:
    """Return whether a key and a name end in the same mark: `response_a` is not `response_j`.

    The mark distinguishes the two answers, and in some formats the better from the worse one.
    """
    return _mark(name) == _mark(key)


def _mark(name: str) -> str:
    found = _MARK.search(name)
    return (found[1] or found[2]).casefold() if found else ""


def _plain(key: str) -> str:
    words = (_SYNONYMS.get(word, word) for word in re.split(r"[\W_]+", key.casefold()))
    return "".join(words)


_RENAMED = ("E201", "E206")  # codes that a column mapping may resolve
_IMITATED = (
    "the row has an answer to imitate, but nothing to compare it with: train it with --loss sft, "
    "or add a worse answer under `rejected`, or a boolean under `label`"
)
_ALSO = {"steps": ("pairs", "lists"), "several": ("pairs",)}
"""Families that also match a row of the given family, and yield to it."""

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True, slots=True)
class Family:
    """Formats that share a reader.

    Attributes:
        name: Its name in the catalogue.
        signs: Names of which such a row has at least one, unless ``--label`` is given.
        claims: Returns whether a row matches, from its keys and the types of its values.
        read: Parses such a row.
    """

    name: str
    signs: frozenset[str]
    claims: Callable[[RowView, FormatSettings], bool]
    read: Callable[[RowView, FormatSettings], ParsedRow]


def holds_ids(view: RowView) -> bool:
    """Return whether a row holds token ids instead of text."""
    return all(map(view.has, _IDS))


def _claims_ids(view: RowView, settings: FormatSettings) -> bool:
    return holds_ids(view)


def _read_ids(view: RowView, settings: FormatSettings) -> ParsedRow:
    reason = "the row holds token ids, but text or messages are expected here"
    raise InvalidRecordError("E206", reason)


FAMILIES = (
    Family("steps", steps.SIGNS, steps.claims, steps.read),
    Family("several", pairs.SIGNS_SEVERAL, pairs.claims_several, pairs.read_several),
    Family("pairs", pairs.SIGNS, pairs.claims, pairs.read),
    Family("swift", pairs.SIGNS_SWIFT, pairs.claims_swift, pairs.read_swift),
    Family("labelled", labelled.SIGNS, labelled.claims, labelled.read),
    Family("rated", lists.SIGNS_SCORED, lists.claims_scored, lists.read_scored),
    Family("lists", lists.SIGNS, lists.claims, lists.read),
    Family("unpaired", unpaired.SIGNS, unpaired.claims, unpaired.read),
    Family("ids", frozenset(_IDS), _claims_ids, _read_ids),
)
_DEMONSTRATIONS = Family(
    "demonstrations", frozenset(), unpaired.claims_demonstration, unpaired.read_demonstration
)
_BY_NAME = {family.name: family for family in (*FAMILIES, _DEMONSTRATIONS)}

KNOWN_KEYS = KNOWN_NAMES.union(BEFORE, *(family.signs for family in FAMILIES))
"""Every name that a format may read."""


def read_row(view: RowView, settings: FormatSettings) -> ParsedRow:
    """Parse a row in its format, or in the format that the settings name.

    Raises:
        InvalidRecordError: E201 and E206 if no format matches, E210 if several do, E213 if the row
            is not of the named format, and every other error in the row.
    """
    try:
        return _read(view, settings)
    except InvalidRecordError as error:
        if error.code not in _RENAMED:
            raise
        hint = layouts.advice(view.row) or renamed(view.row, settings, _try)
        raise InvalidRecordError(error.code, f"{error.reason}{hint}") from None


def _try(row: Row, settings: FormatSettings) -> None:
    _read(RowView(row, settings.columns, settings.strings), settings)


def _read(view: RowView, settings: FormatSettings) -> ParsedRow:
    if settings.format is None:
        return find_family(view, settings).read(view, settings)
    named = FORMATS[settings.format]
    parsed_row = _BY_NAME[named.family].read(view, settings)
    if parsed_row.format != named.name:
        reason = f"the row has the format {parsed_row.format!r}, not {named.name!r}"
        raise InvalidRecordError("E213", reason)
    return parsed_row


def find_family(view: RowView, settings: FormatSettings) -> Family:
    """Find the family whose formats match a row.

    Raises:
        InvalidRecordError: E201 and E206 if there is none, E210 if there are several.
    """
    has_label = settings.parsed_label is not None
    found = [
        family
        for family in FAMILIES
        if (has_label or not view.lacks(family.signs)) and family.claims(view, settings)
    ]
    if found and (also := _ALSO.get(found[0].name)):
        found = [family for family in found if family.name not in also]
    if not found and (labelled.might_claim(view) or (has_label and labelled.outputs(view))):
        return _BY_NAME["labelled"]  # its reader explains what the label lacks
    if not found and pairs.partial_pair(view):
        return _BY_NAME["pairs"]  # its reader names the missing key
    if not found and _DEMONSTRATIONS.claims(view, settings):
        return _DEMONSTRATIONS
    if len(found) > 1:
        names = " and ".join(family.name for family in found)
        raise InvalidRecordError(
            "E210",
            f"the row matches several families of formats ({names}): choose one with --format NAME",
        )
    if not found:
        reason = _IMITATED if unpaired.can_be_imitated(view) else _unknown(view)
        raise InvalidRecordError("E206", reason)
    return found[0]


def _unknown(view: RowView) -> str:
    """Describe the keys of an unknown row, and those that the nearest format needs."""
    if isinstance(view.peek("completions"), list) and isinstance(view.peek("labels"), list):
        return "one solution with a label per step is not a pair: it has nothing to compare with"
    names = view.names()
    keys = ", ".join(f"`{name:.40}`" for name in names[:8])
    listed = f"keys {keys}{', …' if len(names) > 8 else ''}" if names else "no keys"
    near = next(near_formats(names), None)
    if near is None or layouts.advice(view.row):
        return listed
    known, lacking = near
    return f"{listed}; for {known.name!r} it lacks {', '.join(lacking)}"
