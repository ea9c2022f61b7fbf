"""Which format a row has: each family of formats says whether a row is its own."""

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
from logratio.data.formats.responses import Meaning
from logratio.data.formats.row import View
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.rows import Row
from logratio.data.records import InvalidRecordError

_ALIKE = 0.8  # of two keys, as difflib measures
_MARK = re.compile(r"(?:[\W_]|(?<=[a-z]))([0-9]+|[A-Z])$|[\W_]([a-z]|left|right)$")
_SYNONYMS = {"rating": "score", "ratings": "scores"}
_MOST = 64  # keys of a row that are compared

Read = Callable[[Row, FormatSettings], object]
"""Reads a row, or raises `InvalidRecordError`."""


def renamed(row: Row, settings: FormatSettings, read: Read) -> str:
    """Say which flag makes a row that was refused one of a known format.

    Args:
        row: The row.
        settings: Those with which it was refused.
        read: Tries a row with other settings: a flag is named only where it works.

    Returns:
        The end of a sentence; empty where no key is near enough.
    """
    for columns in _near(tuple(key for key, value in row.items() if value is not None)[:_MOST]):
        if columns.keys() & settings.columns.keys():
            continue
        try:
            read(row, replace(settings, columns={**settings.columns, **columns}))
        except InvalidRecordError as error:
            if error.code.startswith("E"):
                continue
        told = ",".join(f"{name}={key}" for name, key in columns.items())
        return f"; did you mean --columns {shlex.quote(told)}?"
    return ""


@lru_cache(maxsize=256)
def _near(keys: tuple[str, ...]) -> Sequence[Mapping[str, str]]:
    """List the columns with which keys are those of a format, fewest first."""
    found = []
    for known in CATALOGUE:
        columns = _columns(keys, known.needs)
        if columns and columns not in found:
            found.append(columns)
    return sorted(found, key=len)


def _columns(keys: Sequence[str], needs: Sequence[Need]) -> dict[str, str] | None:
    """Find a key for each name that is missing; None where there is none for one of them."""
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
    near = get_close_matches(_plain(name), plain, 1, _ALIKE)
    return plain[near[0]] if near else None


def _may_mean(name: str, key: str) -> bool:
    """Say whether a key and a name have the same mark: `response_a` is not `response_j`.

    The mark says which of two answers is meant, and in some formats which is the better one.
    """
    return _mark(name) == _mark(key)


def _mark(name: str) -> str:
    found = _MARK.search(name)
    return (found[1] or found[2]).casefold() if found else ""


def _plain(key: str) -> str:
    words = (_SYNONYMS.get(word, word) for word in re.split(r"[\W_]+", key.casefold()))
    return "".join(words)


_RENAMED = ("E201", "E206")  # which another name for a key may mend
_IMITATED = (
    "the row is an answer to imitate, with nothing to compare it with: train it with --loss sft, "
    "or add a worse answer under `rejected`, or a thumb under `label`"
)
_ALSO = {"steps": ("pairs", "lists"), "several": ("pairs",)}
"""Families that claim a row, too, if one claims it."""

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True, slots=True)
class Family:
    """Formats that one reader takes.

    Attributes:
        name: What the catalogue calls it.
        signs: Names of which such a row has one, unless settings tell what its label means.
        claims: Says whether a row is of this family, from its keys and the types of its values.
        read: Reads such a row.
    """

    name: str
    signs: frozenset[str]
    claims: Callable[[View, FormatSettings], bool]
    read: Callable[[View, FormatSettings], Meaning]


def holds_ids(view: View) -> bool:
    """Say whether a row holds token ids, which no reader of text takes."""
    return all(map(view.has, _IDS))


def _claims_ids(view: View, settings: FormatSettings) -> bool:
    return holds_ids(view)


def _read_ids(view: View, settings: FormatSettings) -> Meaning:
    reason = "the row holds token ids, and text or messages are wanted here"
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

SAID = KNOWN_NAMES.union(BEFORE, *(family.signs for family in FAMILIES))
"""Every name that may matter to what a row says."""


def read_row(view: View, settings: FormatSettings) -> Meaning:
    """Read a row as what it is, or as what it was said to be.

    Raises:
        InvalidRecordError: E201 and E206 where it is nothing known, E210 where it is two things,
            E213 where it is not what it was said to be; whatever else is wrong with it.
    """
    try:
        return _read(view, settings)
    except InvalidRecordError as error:
        if error.code not in _RENAMED:
            raise
        hint = layouts.advice(view.row) or renamed(view.row, settings, _try)
        raise InvalidRecordError(error.code, f"{error.reason}{hint}") from None


def _try(row: Row, settings: FormatSettings) -> None:
    _read(View(row, settings.columns, settings.strings), settings)


def _read(view: View, settings: FormatSettings) -> Meaning:
    if settings.format is None:
        return find_family(view, settings).read(view, settings)
    named = FORMATS[settings.format]
    meaning = _BY_NAME[named.family].read(view, settings)
    if meaning.format != named.name:
        reason = f"the row is {meaning.format!r}, and {named.name!r} is wanted"
        raise InvalidRecordError("E213", reason)
    return meaning


def find_family(view: View, settings: FormatSettings) -> Family:
    """Find the family that a row is of.

    Raises:
        InvalidRecordError: E201 and E206 where there is none, E210 where there are two.
    """
    told = settings.told is not None
    found = [
        family
        for family in FAMILIES
        if (told or not view.lacks(family.signs)) and family.claims(view, settings)
    ]
    if found and (also := _ALSO.get(found[0].name)):
        found = [family for family in found if family.name not in also]
    if not found and (labelled.might_claim(view) or (told and labelled.outputs(view))):
        return _BY_NAME["labelled"]  # which says what is not known of the label
    if not found and pairs.half(view):
        return _BY_NAME["pairs"]  # which says what is missing
    if not found and _DEMONSTRATIONS.claims(view, settings):
        return _DEMONSTRATIONS
    if len(found) > 1:
        names = " and ".join(family.name for family in found)
        raise InvalidRecordError(
            "E210",
            f"the row holds what makes it one of several families ({names}): say with --format "
            "NAME what it is",
        )
    if not found:
        reason = _IMITATED if unpaired.can_be_imitated(view) else _unknown(view)
        raise InvalidRecordError("E206", reason)
    return found[0]


def _unknown(view: View) -> str:
    """Say what a row that is nothing known has, and what it lacks."""
    if isinstance(view.peek("completions"), list) and isinstance(view.peek("labels"), list):
        return "one solution with a label a step is no pair: it has nothing to compare with"
    names = view.names()
    keys = ", ".join(f"`{name:.40}`" for name in names[:8])
    told = f"keys {keys}{', …' if len(names) > 8 else ''}" if names else "no keys"
    near = next(near_formats(names), None)
    if near is None or layouts.advice(view.row):
        return told
    known, lacking = near
    return f"{told}; for {known.name!r} it lacks {', '.join(lacking)}"
