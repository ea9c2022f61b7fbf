"""Which format a row has: each family of formats says whether a row is its own."""

from collections.abc import Callable
from dataclasses import dataclass

from logratio.data import layouts
from logratio.data.containers import Row
from logratio.data.formats import (
    demonstrations,
    labelled,
    lists,
    pairs,
    rated,
    several,
    steps,
    unpaired,
)
from logratio.data.formats.catalogue import FORMATS, KNOWN_NAMES, near_formats
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.questions import BEFORE
from logratio.data.formats.renaming import renamed
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import View
from logratio.data.records import InvalidRecordError

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
    Family("several", several.SIGNS, several.claims, several.read),
    Family("pairs", pairs.SIGNS, pairs.claims, pairs.read),
    Family("swift", pairs.SIGNS_SWIFT, pairs.claims_swift, pairs.read_swift),
    Family("labelled", labelled.SIGNS, labelled.claims, labelled.read),
    Family("rated", rated.SIGNS, rated.claims, rated.read),
    Family("lists", lists.SIGNS, lists.claims, lists.read),
    Family("unpaired", unpaired.SIGNS, unpaired.claims, unpaired.read),
    Family("ids", frozenset(_IDS), _claims_ids, _read_ids),
)
_DEMONSTRATIONS = Family("demonstrations", frozenset(), demonstrations.claims, demonstrations.read)
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
        reason = _IMITATED if demonstrations.can_be_imitated(view) else _unknown(view)
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
