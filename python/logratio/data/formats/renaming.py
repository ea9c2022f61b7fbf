"""Keys that are nearly those of a known format: another case, other marks, a slip of the pen."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache

from logratio.data.containers import Row
from logratio.data.formats.catalogue import CATALOGUE, Need
from logratio.data.formats.settings import FormatSettings
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
