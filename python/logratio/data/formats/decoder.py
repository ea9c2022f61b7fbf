"""Decode rows to records one at a time, and detect the format of some rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

from logratio.data import conversations
from logratio.data.formats.catalogue import FORMATS, near_formats
from logratio.data.formats.families import KNOWN_KEYS, holds_ids, read_row
from logratio.data.formats.labelled import explain_unknown_label
from logratio.data.formats.lists import MOST
from logratio.data.formats.prompts import check_unread
from logratio.data.formats.responses import ParsedRow
from logratio.data.formats.row import FLAGS, RowView
from logratio.data.formats.settings import FormatSettings, Kind
from logratio.data.formats.values import is_storable, values_of_ids, with_values
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

RecordsAndOmissions = tuple[list[PreferenceRecord], list[str]]
"""Records, and the codes of the omitted ones."""


def records_of(
    parsed_row: ParsedRow, source: Source, settings: FormatSettings
) -> RecordsAndOmissions:
    """Convert a parsed row to records.

    Raises:
        InvalidRecordError: R301, R302 or R310 if no record is left, E206 for unpaired feedback
            among demonstrations.
    """
    if settings.demonstrations:
        return [_demonstration(parsed_row, source)], []
    if parsed_row.kind != "group":
        for completion in parsed_row.completions:
            _check_not_empty(completion)
        if parsed_row.kind == "pair":
            _check_different(*parsed_row.completions)
        return [_record(parsed_row, parsed_row.completions, source)], []
    if len(parsed_row.values) == 1:
        reason = "the list has one answer, and nothing to compare it with"
        raise InvalidRecordError("R310", reason)
    if settings.lists == "groups":
        return _group(parsed_row, source)
    if settings.lists == "best_worst":
        values = parsed_row.values
        best, worst = values.index(max(values)), values.index(min(values))
        return _pairs(parsed_row, source, [(best, worst)])
    if len(parsed_row.values) > MOST:
        reason = f"a list of {len(parsed_row.values):,} answers makes too many pairs (most: {MOST})"
        raise InvalidRecordError("E212", f"{reason}: use --lists best_worst or groups")
    places: Iterable[tuple[int, int]] = combinations(range(len(parsed_row.values)), 2)
    if parsed_row.is_binary:
        places = ((a, b) for a, b in places if parsed_row.values[a] != parsed_row.values[b])
    return _pairs(parsed_row, source, list(places))


def is_empty(completion: Completion) -> bool:
    """Return whether the trained part of a completion has no words."""
    answer = completion.answer
    words = answer if isinstance(answer, str) else conversations.words(answer)
    return not words.strip()


def _record(
    parsed_row: ParsedRow, completions: Sequence[Completion], source: Source
) -> PreferenceRecord:
    return PreferenceRecord(
        parsed_row.prompt, tuple(completions), source, parsed_row.tools, parsed_row.ends
    )


def _demonstration(parsed_row: ParsedRow, source: Source) -> PreferenceRecord:
    if parsed_row.kind == "unpaired":
        raise InvalidRecordError(
            "E206",
            "a row with a label is not a demonstration: to imitate good answers, remove the bad "
            "ones, and the label of the others",
        )
    best = parsed_row.values.index(max(parsed_row.values)) if parsed_row.values else 0
    best_one = parsed_row.completions[best]
    score = None if parsed_row.is_binary else best_one.score
    completion = replace(best_one, role=DEMONSTRATION, score=score, margin=None)
    _check_not_empty(completion)
    return _record(parsed_row, [completion], source)


def _pairs(
    parsed_row: ParsedRow, source: Source, places: Sequence[tuple[int, int]]
) -> RecordsAndOmissions:
    """Build a pair from each two places whose values differ."""
    records, left_out = [], []
    for first, second in places:
        gap = parsed_row.values[first] - parsed_row.values[second]
        sides = _sides(parsed_row, *((first, second) if gap > 0 else (second, first)))
        fault = "R310" if gap == 0 else next(_faults(sides), None)
        if fault:
            left_out.append(fault)
        else:
            records.append(_record(parsed_row, sides, source))
    return _some(records, left_out)


def _sides(parsed_row: ParsedRow, better: int, worse: int) -> list[Completion]:
    """Build the sides of a pair from two places of a list, with the gap as its margin."""
    chosen, rejected = (parsed_row.completions[place] for place in (better, worse))
    if parsed_row.is_binary:  # good or bad: no number of the data
        return [
            replace(chosen, role=CHOSEN, score=None),
            replace(rejected, role=REJECTED, score=None),
        ]
    gap = parsed_row.values[better] - parsed_row.values[worse]
    margin = gap if is_storable(gap) else None
    return [replace(chosen, role=CHOSEN, margin=margin), replace(rejected, role=REJECTED)]


def _faults(sides: Sequence[Completion]) -> Iterator[str]:
    if any(map(is_empty, sides)):
        yield "R301"
    if _content(sides[0]) == _content(sides[1]):
        yield "R302"


def _group(parsed_row: ParsedRow, source: Source) -> RecordsAndOmissions:
    """Build one group, best first, without empty and repeated completions."""
    order = sorted(range(len(parsed_row.values)), key=lambda place: -parsed_row.values[place])
    kept: list[int] = []
    left_out = []
    contents = []
    for place in order:
        completion = parsed_row.completions[place]
        if is_empty(completion):
            left_out.append("R301")
        elif _content(completion) in contents:
            left_out.append("R302")
        else:
            kept.append(place)
            contents.append(_content(completion))
    if len({parsed_row.values[place] for place in kept}) < 2:
        return _some([], left_out or ["R310"])
    completions = tuple(parsed_row.completions[place] for place in kept)
    assert all(completion.role == CANDIDATE for completion in completions)
    return [_record(parsed_row, completions, source)], left_out


def _some(records: list[PreferenceRecord], left_out: list[str]) -> RecordsAndOmissions:
    """Refuse a row without any record, for its most common reason."""
    if records:
        return records, left_out
    reasons = {
        "R310": "no answer of the list is better than another",
        "R301": "every pair of the list has an empty completion",
        "R302": "every pair of the list is identical",
    }
    code = max(reasons, key=left_out.count)
    raise InvalidRecordError(code, reasons[code])


def _content(completion: Completion) -> tuple[object, object]:
    answer = completion.answer
    return completion.context, answer if isinstance(answer, str) else conversations.ended(answer)


def _check_not_empty(completion: Completion) -> None:
    if is_empty(completion):
        raise InvalidRecordError("R301", f"the {completion.role} completion is empty")


def _check_different(chosen: Completion, rejected: Completion) -> None:
    if _content(chosen) == _content(rejected):
        raise InvalidRecordError("R302", "the chosen and the rejected completion are identical")


_KIND_NAMES: Mapping[Kind, str] = {
    "pair": "a preference pair",
    "unpaired": "unpaired feedback",
    "group": "a ranked list",
    "demonstration": "a demonstration",
}
_USES: Mapping[Kind, str] = {
    "pair": "--loss dpo trains on pairs",
    "unpaired": "--loss kto trains on single answers with labels",
    "group": "--lists pairs makes pairs of lists, and --loss plackett-luce trains on lists",
    "demonstration": "--loss sft trains on demonstrations",
}
"""What trains on each kind of records, for messages."""
_TEXTS = {"prompt", "chosen", "rejected"}
_NOTHING = (None, None)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A row as records.

    Attributes:
        records: One record, or several pairs of a ranked list. Empty only for token ids.
        format: The name of its format.
        extra_keys: Keys that were not read.
        left_out: A code for each pair of a list, or completion, that was left out: R310 for a tie,
            R301, R302.
        warnings: Codes of the row's warnings.
    """

    records: tuple[PreferenceRecord, ...]
    format: str
    extra_keys: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether a chat template renders the records."""
        return any(record.is_chat for record in self.records)


class Decoder:
    """Decodes rows of any known format, each in its own format.

    It remembers the first row of each file: all rows of a file must be of one kind (pairs, unpaired
    feedback, lists) and have prompts of one kind (text or chat), but their formats may differ.

    Attributes:
        settings: How to read the data.

    Example:
        >>> row = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
        >>> decoded = Decoder().decode(row, Source("pairs.jsonl", 1))
        >>> decoded.format, len(decoded.records)
        ('trl', 1)
    """

    def __init__(self, settings: FormatSettings | None = None) -> None:
        self.settings = settings or FormatSettings()
        self._first: dict[str, tuple[Kind, Source]] = {}
        self._plain: dict[str, tuple[bool, Source]] = {}
        self._spelled: dict[str, tuple[bool, Source]] = {}
        kinds, lists = self.settings.kinds, self.settings.lists
        others = replace(
            self.settings,
            kinds=None,
            strings=None,
            split=None,
            encoding=None,
            rows=None,
            group_by=None,
        )
        self._reads_by_default = others == FormatSettings(lists=lists) and (
            not kinds or "pair" in kinds
        )

    def decode(self, row: Row, source: Source) -> Decoded:
        """Decode a row.

        Args:
            row: The row, as the JSON object of one line.
            source: Its file and line.

        Returns:
            Its records, its format and its warnings.

        Raises:
            InvalidRecordError: E2xx if the format is unknown or malformed, E403 if the roles of
                turns make no prompt and answer, R301, R302 or R310 for unusable content.
        """
        settings = self.settings
        view = RowView(row, settings.columns, settings.strings)
        parsed_row = with_values(view, read_row(view, settings))
        check_unread(view)
        self._check_kind(parsed_row, source)
        if view.is_plain is not None:
            self._check_plain(view.is_plain, source)
        spelled = ("W522",) if self._is_spelled(view, source) else ()
        warnings = (*spelled, *parsed_row.warnings)
        try:
            records, left_out = records_of(parsed_row, source, settings)
        except InvalidRecordError as error:
            error.format = parsed_row.format
            raise
        extra = view.extra_keys()
        return Decoded(tuple(records), parsed_row.format, extra, tuple(left_out), warnings)

    def holds_pairs_of_text(self, file: str, names: Iterable[str]) -> bool:
        """Return whether rows of strings in a file must be plain text pairs.

        This allows reading their columns directly, without decoding each row.

        Args:
            file: The name of the container.
            names: All keys of its rows, except columns of values that the caller reads itself.

        Returns:
            Whether `prompt`, `chosen` and `rejected`, if strings, are a pair of plain text and no
            other key is read. False until a row of the file has been decoded.
        """
        return (
            self._reads_by_default
            and self._first.get(file, _NOTHING)[0] == "pair"
            and self._plain.get(file, _NOTHING)[0] is True
            and KNOWN_KEYS.intersection(names) == _TEXTS
        )

    def state(self) -> dict[str, Any]:
        """Return the state of each file's first row, as JSON values."""
        return {
            "first": {file: (kind, at.line) for file, (kind, at) in self._first.items()},
            "plain": {file: (is_plain, at.line) for file, (is_plain, at) in self._plain.items()},
            "spelled": {
                file: (contents, at.line) for file, (contents, at) in self._spelled.items()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state`."""
        memories: dict[str, dict[str, Any]] = {
            "first": self._first,
            "plain": self._plain,
            "spelled": self._spelled,
        }
        for name, memory in memories.items():
            values = state.get(name, {})
            memory.update(
                {file: (contents, Source(file, at)) for file, (contents, at) in values.items()}
            )

    def _check_kind(self, parsed_row: ParsedRow, source: Source) -> None:
        """Refuse a kind that the settings exclude or that differs from the file's first row."""
        if self.settings.demonstrations:
            return
        kind: Kind = "pair" if self._makes_pairs(parsed_row) else parsed_row.kind
        wanted = self.settings.kinds
        if wanted is not None and kind not in wanted:
            names = " or ".join(_KIND_NAMES[name] for name in wanted)
            reason = f"the row is {_KIND_NAMES[kind]}, but {names} is expected: {_USES[kind]}"
            raise InvalidRecordError("E206", reason)
        first, place = self._first.setdefault(source.file, (kind, source))
        if kind != first:
            reason = f"the row is {_KIND_NAMES[kind]}, but {place} is {_KIND_NAMES[first]}"
            raise InvalidRecordError("E204", f"{reason}: put them into separate files")

    def _check_plain(self, is_plain: bool, source: Source) -> None:
        """Refuse prompts that are plain text in one row and a user turn in another."""
        first, place = self._plain.setdefault(source.file, (is_plain, source))
        if is_plain != first:
            names = "plain text", "messages, because the row has a system prompt or a history"
            this, that = names if is_plain else reversed(names)
            reason = f"the prompt is {this}, but that of {place} is {that}"
            raise InvalidRecordError("E204", f"{reason}: give every row the same keys")

    def _is_spelled(self, view: RowView, source: Source) -> bool:
        """Return whether a row's chats were strings; refuse a file that mixes them with text."""
        if view.is_spelled is None or self.settings.strings:
            return False
        first, place = self._spelled.setdefault(source.file, (view.is_spelled, source))
        if view.is_spelled != first:
            names = "text", "lists of messages that were written as text"
            this, that = reversed(names) if view.is_spelled else names
            reason = f"the row's strings are {this}, but those of {place} are {that}"
            raise InvalidRecordError("E215", f"{reason}: {FLAGS}")
        return first

    def _makes_pairs(self, parsed_row: ParsedRow) -> bool:
        return parsed_row.kind == "group" and self.settings.lists != "groups"


Result = Decoded | InvalidRecordError
"""The result of `try_row`."""

_SAMPLE = "these rows"
_UNKNOWN = {"E201", "E206"}
_NEAR = 3


@dataclass(frozen=True, slots=True)
class Detection:
    """The format of some rows.

    Attributes:
        format: The format of all rows that were read. None: several formats, or none.
        reason: A sentence that explains the result.
        counts: Number of rows per format.
        refused: Number of refused rows per reason, as ``[CODE] text``.
        near: If no row was recognised: similar formats, with the keys that the rows lack.
    """

    format: str | None
    reason: str
    counts: Mapping[str, int]
    refused: Mapping[str, int]
    near: Mapping[str, tuple[str, ...]]


def detect(rows: Sequence[Row], settings: FormatSettings | None = None) -> Detection:
    """Detect the format of some rows.

    Args:
        rows: Some rows of one file.
        settings: How to read them. None: the defaults.

    Returns:
        The format, the reason, and the counts.
    """
    decoder = Decoder(settings)
    results = [try_row(decoder, row, Source(_SAMPLE, line)) for line, row in enumerate(rows, 1)]
    return summarize(rows, results, decoder.settings)


def try_row(decoder: Decoder, row: Row, source: Source) -> Result:
    """Decode a row, or return its error. A row of token ids is recognised, without any record."""
    view = RowView(row, decoder.settings.columns)
    try:
        if holds_ids(view):
            return _decoded_ids(view)
        return decoder.decode(row, source)
    except InvalidRecordError as error:
        return error


def _decoded_ids(view: RowView) -> Decoded:
    for (name,) in FORMATS["ids"].needs:
        view.note(name)
    warnings = values_of_ids(view).warnings
    return Decoded((), "ids", view.extra_keys(), warnings=warnings)


def summarize(
    rows: Sequence[Row], results: Sequence[Result], settings: FormatSettings
) -> Detection:
    """Summarize the results of rows that were tried one by one.

    Args:
        rows: The rows.
        results: The result of `try_row` for each.
        settings: How they were read.
    """
    counts = Counter(result.format for result in results if isinstance(result, Decoded))
    refused = Counter(str(result) for result in results if isinstance(result, InvalidRecordError))
    name = next(iter(counts)) if len(counts) == 1 else None
    if counts:
        reasons = [_why(known, rows, results) for known in counts]
        return Detection(name, "; ".join(reasons), counts, refused, {})
    reason = refused.most_common(1)[0][0] if refused else "no rows to inspect"
    codes = {result.code for result in results if isinstance(result, InvalidRecordError)}
    if codes == {"E209"} and (sentence := explain_unknown_label(rows, settings)):
        reason = f"[E209] {sentence}"
    return Detection(None, reason, counts, refused, _near(rows) if codes & _UNKNOWN else {})


def _why(name: str, rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Return the keys by which rows were recognised, with the description of their format."""
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, Decoded) and result.format == name:
            keys = [f"`{key}`" for key in row if key not in result.extra_keys]
            title = FORMATS[name].title
            has_all = all(key in title for key in keys)
            return title if has_all else f"{', '.join(keys)}: {title}"
    return FORMATS[name].title


def _near(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    if any(map(advice, rows)):
        return {}
    names = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))
    return {known.name: lacking for known, lacking in islice(near_formats(names), _NEAR)}
