"""Rows to records, one row at a time, and which format some rows of a file have."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

from logratio.data import conversations
from logratio.data.formats.catalogue import FORMATS, near_formats
from logratio.data.formats.families import SAID, holds_ids, read_row
from logratio.data.formats.labelled import untold
from logratio.data.formats.lists import MOST
from logratio.data.formats.prompts import check_unread
from logratio.data.formats.responses import Meaning
from logratio.data.formats.row import FLAGS, View
from logratio.data.formats.settings import FormatSettings, Kind
from logratio.data.layouts import advice
from logratio.data.readers.rows import Row
from logratio.data.records import (
    CANDIDATE,
    CHOSEN,
    DEMONSTRATION,
    REJECTED,
    Completion,
    InvalidRecordError,
    PreferenceRecord,
    Source,
)

Chosen = tuple[list[PreferenceRecord], list[str]]
"""Records, and the codes of what was left out of them."""


def records_of(meaning: Meaning, source: Source, settings: FormatSettings) -> Chosen:
    """Make a row's records.

    Raises:
        InvalidRecordError: R301, R302, R310 where nothing is left of it, E206 where unpaired
            feedback would have to be imitated.
    """
    if settings.demonstrations:
        return [_demonstration(meaning, source)], []
    if meaning.kind != "group":
        for completion in meaning.completions:
            _check_not_empty(completion)
        if meaning.kind == "pair":
            _check_different(*meaning.completions)
        return [_record(meaning, meaning.completions, source)], []
    if len(meaning.values) == 1:
        reason = "the list has one answer, and nothing to compare it with"
        raise InvalidRecordError("R310", reason)
    if settings.lists == "groups":
        return _group(meaning, source)
    if settings.lists == "best_worst":
        values = meaning.values
        best, worst = values.index(max(values)), values.index(min(values))
        return _pairs(meaning, source, [(best, worst)])
    if len(meaning.values) > MOST:
        reason = f"a list of {len(meaning.values):,} answers makes too many pairs (most: {MOST})"
        raise InvalidRecordError("E212", f"{reason}: take --lists best_worst or groups")
    places: Iterable[tuple[int, int]] = combinations(range(len(meaning.values)), 2)
    if meaning.is_sided:
        places = ((a, b) for a, b in places if meaning.values[a] != meaning.values[b])
    return _pairs(meaning, source, list(places))


def is_empty(completion: Completion) -> bool:
    """Say whether a completion has no words that count."""
    answer = completion.answer
    words = answer if isinstance(answer, str) else conversations.words(answer)
    return not words.strip()


def _record(
    meaning: Meaning, completions: Sequence[Completion], source: Source
) -> PreferenceRecord:
    return PreferenceRecord(meaning.prompt, tuple(completions), source, meaning.tools, meaning.ends)


def _demonstration(meaning: Meaning, source: Source) -> PreferenceRecord:
    if meaning.kind == "unpaired":
        raise InvalidRecordError("E206", "a labelled row is no demonstration")
    best = meaning.values.index(max(meaning.values)) if meaning.values else 0
    best_one = meaning.completions[best]
    completion = Completion(DEMONSTRATION, best_one.answer, best_one.context)
    _check_not_empty(completion)
    return _record(meaning, [completion], source)


def _pairs(meaning: Meaning, source: Source, places: Sequence[tuple[int, int]]) -> Chosen:
    """Make a pair of each two places whose values differ."""
    records, left_out = [], []
    for first, second in places:
        gap = meaning.values[first] - meaning.values[second]
        better, worse = (first, second) if gap > 0 else (second, first)
        sides = [
            Completion(role, meaning.completions[place].answer, meaning.completions[place].context)
            for role, place in ((CHOSEN, better), (REJECTED, worse))
        ]
        fault = "R310" if gap == 0 else next(_faults(sides), None)
        if fault:
            left_out.append(fault)
        else:
            records.append(_record(meaning, sides, source))
    return _some(records, left_out)


def _faults(sides: Sequence[Completion]) -> Iterator[str]:
    if any(map(is_empty, sides)):
        yield "R301"
    if _said(sides[0]) == _said(sides[1]):
        yield "R302"


def _group(meaning: Meaning, source: Source) -> Chosen:
    """Make one group, best first; empty and repeated completions are left out."""
    order = sorted(range(len(meaning.values)), key=lambda place: -meaning.values[place])
    kept: list[int] = []
    left_out = []
    said = []
    for place in order:
        completion = meaning.completions[place]
        if is_empty(completion):
            left_out.append("R301")
        elif _said(completion) in said:
            left_out.append("R302")
        else:
            kept.append(place)
            said.append(_said(completion))
    values = tuple(meaning.values[place] for place in kept)
    if len(set(values)) < 2:
        return _some([], left_out or ["R310"])
    completions = tuple(meaning.completions[place] for place in kept)
    assert all(completion.role == CANDIDATE for completion in completions)
    record = PreferenceRecord(
        meaning.prompt, completions, source, meaning.tools, meaning.ends, values
    )
    return [record], left_out


def _some(records: list[PreferenceRecord], left_out: list[str]) -> Chosen:
    """Refuse a row of which nothing is left, for its most common reason."""
    if records:
        return records, left_out
    reasons = {
        "R310": "no answer of the list is better than another",
        "R301": "every pair of the list has an empty completion",
        "R302": "every pair of the list is identical",
    }
    code = max(reasons, key=left_out.count)
    raise InvalidRecordError(code, reasons[code])


def _said(completion: Completion) -> tuple[object, object]:
    answer = completion.answer
    return completion.context, answer if isinstance(answer, str) else conversations.ended(answer)


def _check_not_empty(completion: Completion) -> None:
    if is_empty(completion):
        raise InvalidRecordError("R301", f"the {completion.role} completion is empty")


def _check_different(chosen: Completion, rejected: Completion) -> None:
    if _said(chosen) == _said(rejected):
        raise InvalidRecordError("R302", "the chosen and the rejected completion are identical")


_CALLED: Mapping[Kind, str] = {
    "pair": "a preference pair",
    "unpaired": "unpaired feedback",
    "group": "a ranked list",
    "demonstration": "a demonstration",
}
_TEXTS = {"prompt", "chosen", "rejected"}
_NOTHING = (None, None)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A row as records.

    Attributes:
        records: What it says; one, but for a ranked list that became pairs. At least one.
        format: The name of its format.
        extra_keys: Keys that were not read.
        left_out: For each pair of a list that was not made, or completion that was not taken, the
            code of the reason: R310 for a tie, R301, R302.
        warnings: Codes of what is kept and counted of the row.
    """

    records: tuple[PreferenceRecord, ...]
    format: str
    extra_keys: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes the records."""
        return any(record.is_chat for record in self.records)


class Decoder:
    """Reads rows of any known format, each as what it is.

    It remembers what the first row of each file was: one file says one kind of thing (pairs,
    unpaired feedback, lists) and its prompts are of one kind, while its rows may have different
    formats.

    Attributes:
        settings: What was said about the data.
    """

    def __init__(self, settings: FormatSettings | None = None) -> None:
        self.settings = settings or FormatSettings()
        self._first: dict[str, tuple[Kind, Source]] = {}
        self._plain: dict[str, tuple[bool, Source]] = {}
        self._spelled: dict[str, tuple[bool, Source]] = {}
        kinds, lists = self.settings.kinds, self.settings.lists
        told = replace(
            self.settings,
            kinds=None,
            strings=None,
            split=None,
            encoding=None,
            rows=None,
            group_by=None,
        )
        self._is_untold = told == FormatSettings(lists=lists) and (not kinds or "pair" in kinds)

    def decode(self, row: Row, source: Source) -> Decoded:
        """Read a row.

        Args:
            row: The JSON object of one line.
            source: Its file and line.

        Raises:
            InvalidRecordError: E2xx where the format is unknown or broken, E403 where roles do not
                fit, R301, R302 and R310 where the content is of no use.
        """
        settings = self.settings
        view = View(row, settings.columns, settings.strings)
        meaning = read_row(view, settings)
        check_unread(view)
        self._check_kind(meaning, source)
        if view.is_plain is not None:
            self._check_plain(view.is_plain, source)
        spelled = ("W522",) if self._is_spelled(view, source) else ()
        warnings = (*spelled, *meaning.warnings)
        try:
            records, left_out = records_of(meaning, source, settings)
        except InvalidRecordError as error:
            error.format = meaning.format
            raise
        extra = view.extra_keys()
        return Decoded(tuple(records), meaning.format, extra, tuple(left_out), warnings)

    def holds_pairs_of_text(self, file: str, names: Iterable[str]) -> bool:
        """Say what rows of a file can only be, if their prompt, chosen and rejected are strings.

        Args:
            file: The name of their container.
            names: All their keys.

        Returns:
            Whether these are a pair of plain text and nothing else is read of them. Only known
            once a row of the file was decoded.
        """
        return (
            self._is_untold
            and self._first.get(file, _NOTHING)[0] == "pair"
            and self._plain.get(file, _NOTHING)[0] is True
            and SAID.intersection(names) == _TEXTS
        )

    def state(self) -> dict[str, Any]:
        """Return what it remembers of each file's first row, as JSON values."""
        return {
            "first": {file: (kind, at.line) for file, (kind, at) in self._first.items()},
            "plain": {file: (is_plain, at.line) for file, (is_plain, at) in self._plain.items()},
            "spelled": {file: (said, at.line) for file, (said, at) in self._spelled.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        memories: dict[str, dict[str, Any]] = {
            "first": self._first,
            "plain": self._plain,
            "spelled": self._spelled,
        }
        for name, memory in memories.items():
            values = state.get(name, {})
            memory.update({file: (said, Source(file, at)) for file, (said, at) in values.items()})

    def _check_kind(self, meaning: Meaning, source: Source) -> None:
        """Refuse what is not wanted, and what the file's first row was not."""
        if self.settings.demonstrations:
            return
        kind: Kind = "pair" if self._makes_pairs(meaning) else meaning.kind
        wanted = self.settings.kinds
        if wanted is not None and kind not in wanted:
            names = " or ".join(_CALLED[name] for name in wanted)
            raise InvalidRecordError("E206", f"the row is {_CALLED[kind]}, and {names} is wanted")
        first, place = self._first.setdefault(source.file, (kind, source))
        if kind != first:
            reason = f"the row is {_CALLED[kind]}, and {place} is {_CALLED[first]}"
            raise InvalidRecordError("E204", f"{reason}: put them into files of their own")

    def _check_plain(self, is_plain: bool, source: Source) -> None:
        """Refuse prompts that are plain text in one row and a user's turn in another."""
        first, place = self._plain.setdefault(source.file, (is_plain, source))
        if is_plain != first:
            names = "plain text", "messages, for a system prompt or a history stands beside it"
            this, that = names if is_plain else reversed(names)
            reason = f"the prompt is {this}, and that of {place} is {that}"
            raise InvalidRecordError("E204", f"{reason}: give every row the same keys")

    def _is_spelled(self, view: View, source: Source) -> bool:
        """Say whether strings spelled a row's chats; refuse a file where others were text."""
        if view.is_spelled is None or self.settings.strings:
            return False
        first, place = self._spelled.setdefault(source.file, (view.is_spelled, source))
        if view.is_spelled != first:
            names = "text", "lists of messages that were written as text"
            this, that = reversed(names) if view.is_spelled else names
            reason = f"the row's strings are {this}, and those of {place} are {that}"
            raise InvalidRecordError("E215", f"{reason}: {FLAGS}")
        return first

    def _makes_pairs(self, meaning: Meaning) -> bool:
        return meaning.kind == "group" and self.settings.lists != "groups"


Result = Decoded | InvalidRecordError
"""A row that was tried."""

_SAMPLE = "these rows"
_UNKNOWN = {"E201", "E206"}
_NEAR = 3


@dataclass(frozen=True, slots=True)
class Detection:
    """What rows are.

    Attributes:
        format: The format of all rows that were read; None where there are several, or none.
        reason: Why, or why not, in a sentence.
        counts: How many rows have each format.
        refused: How many rows were refused for each reason, as ``[CODE] text``.
        near: Where no row is known: formats of which some keys are there, and what they lack.
    """

    format: str | None
    reason: str
    counts: Mapping[str, int]
    refused: Mapping[str, int]
    near: Mapping[str, tuple[str, ...]]


def detect(rows: Sequence[Row], settings: FormatSettings | None = None) -> Detection:
    """Say what rows are.

    Args:
        rows: Some rows of one file.
        settings: What was said about them.
    """
    decoder = Decoder(settings)
    results = [try_row(decoder, row, Source(_SAMPLE, line)) for line, row in enumerate(rows, 1)]
    return summarize(rows, results, decoder.settings)


def try_row(decoder: Decoder, row: Row, source: Source) -> Result:
    """Decode a row, or say why not; a row of token ids is known, and has no record of text."""
    view = View(row, decoder.settings.columns)
    if holds_ids(view):
        read = {view.key(name) for (name,) in FORMATS["ids"].needs}
        return Decoded((), "ids", tuple(key for key in row if key not in read))
    try:
        return decoder.decode(row, source)
    except InvalidRecordError as error:
        return error


def summarize(
    rows: Sequence[Row], results: Sequence[Result], settings: FormatSettings
) -> Detection:
    """Say what rows are that were tried one by one.

    Args:
        rows: The rows.
        results: What `try_row` made of each.
        settings: What was said about them.
    """
    counts = Counter(result.format for result in results if isinstance(result, Decoded))
    refused = Counter(str(result) for result in results if isinstance(result, InvalidRecordError))
    name = next(iter(counts)) if len(counts) == 1 else None
    if counts:
        told = [_why(known, rows, results) for known in counts]
        return Detection(name, "; ".join(told), counts, refused, {})
    reason = refused.most_common(1)[0][0] if refused else "there is no row to look at"
    codes = {result.code for result in results if isinstance(result, InvalidRecordError)}
    if codes == {"E209"} and (sentence := untold(rows, settings)):
        reason = f"[E209] {sentence}"
    return Detection(None, reason, counts, refused, _near(rows) if codes & _UNKNOWN else {})


def _why(name: str, rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Say by which keys a row was taken for a format."""
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, Decoded) and result.format == name:
            keys = [f"`{key}`" for key in row if key not in result.extra_keys]
            title = FORMATS[name].title
            is_told = all(key in title for key in keys)
            return title if is_told else f"{', '.join(keys)}: {title}"
    return FORMATS[name].title


def _near(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    if any(map(advice, rows)):
        return {}
    names = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))
    return {known.name: lacking for known, lacking in islice(near_formats(names), _NEAR)}
