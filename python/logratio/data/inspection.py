"""Inspect files of preference data: read and show their first rows."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import numpy as np

from logratio._rust import VALUES
from logratio.data import layouts
from logratio.data.conversations import counts
from logratio.data.formats.catalogue import FORMATS
from logratio.data.formats.decoder import Decoded, Decoder, Detection, Result, summarize, try_row
from logratio.data.formats.settings import FormatSettings
from logratio.data.messages import Turns
from logratio.data.readers.inputs import Inputs, open_inputs
from logratio.data.readers.rows import Row, Rows
from logratio.data.records import (
    CODES,
    Completion,
    InvalidRecordError,
    Omitted,
    PreferenceRecord,
    Refusal,
    Source,
    Text,
)
from logratio.data.store.turn_weights import IMITATES_BAD_TURNS, WeightCounts
from logratio.data.store.value_counts import ValueCounts, to_lines, value_counts
from logratio.data.tokenization.groups import TokenizedCompletion, TokenizedGroup
from logratio.data.tokenization.tokenizer import PreferenceTokenizer, is_rendered
from logratio.forecast import count

Style = Literal["", "title", "counts", "fault", "dim"]

CHARACTERS = 600
"""Most characters of a text that are shown, half of them from its end."""
TOKENS = 120
"""Most tokens of a prompt or a completion that are shown."""

_BETWEEN = "│"  # separates two tokens
_CONTROLS = {chr(code): f"\\x{code:02x}" for code in (*range(9), *range(11, 32), 127)}


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a text in one style; ``counts`` marks trained text."""

    text: str
    style: Style = ""


def plain(segments: Iterable[Segment]) -> str:
    """Join segments without colours; trained text is enclosed in ‹ and ›."""
    return "".join(f"‹{one.text}›" if one.style == "counts" else one.text for one in segments)


def show_record(record: PreferenceRecord) -> Iterator[Segment]:
    """Show a record as text."""
    yield Segment("  prompt\n", "title")
    if record.tools:
        yield Segment(f"[{count(len(record.tools), 'tool')}]\n", "dim")
    yield from _text(record.prompt)
    for completion in record.completions:
        yield Segment(f"  {completion.role}{_values(completion)}\n", "title")
        yield from _completion(completion)


def show_tokens(group: TokenizedGroup, decode: Callable[[Sequence[int]], str]) -> Iterator[Segment]:
    """Show a record as separated tokens, including special tokens.

    Args:
        group: The record's ids.
        decode: Decodes ids to text, including special tokens.
    """
    yield Segment(f"  prompt, {count(len(group.prompt_ids), 'token')}\n", "title")
    yield from _tokens(group.prompt_ids, [0] * len(group.prompt_ids), [], decode)
    for completion in group.completions:
        counted = (
            f"{sum(map(bool, completion.mask)):,} of {len(completion.ids):,} tokens are trained"
            f"{_weights(completion)}"
        )
        yield Segment(f"  {completion.role}{_values(completion)}, {counted}\n", "title")
        yield from _tokens(completion.ids, completion.mask, group.prompt_ids[-1:], decode)
    if group.notes:
        warnings = "; ".join(f"[{code}] {CODES[code]}" for code in dict.fromkeys(group.notes))
        yield Segment(f"  warnings   {warnings}\n", "fault")


def _values(completion: Completion | TokenizedCompletion) -> str:
    """Return the values of a completion in brackets, as " (score 8, margin 3)"; "" for none."""
    pairs = zip(VALUES, completion.values, strict=True)
    named = ", ".join(f"{name} {value:g}" for name, value in pairs if value is not None)
    return f" ({named})" if named else ""


def _weights(completion: TokenizedCompletion) -> str:
    """Return the weights of its trained turns, as ", with the weights −1, 1"; "" if all are 1."""
    found = dict.fromkeys(weight for weight in completion.mask if weight)
    if not {*found} - {1}:
        return ""
    return f", with the weights {', '.join(f'{one:g}' for one in found)}".replace("-", "−")


def _completion(completion: Completion) -> Iterator[Segment]:
    answer = completion.answer
    if not isinstance(answer, str):
        yield from _text(completion.context)
        yield from _turns(answer, is_answer=True)
        return
    if isinstance(completion.context, str) and completion.context:
        yield Segment(_visible(completion.context), "dim")
    yield Segment(_visible(answer), "counts")
    yield Segment("\n")


def _text(text: Text) -> Iterator[Segment]:
    if isinstance(text, str):
        yield Segment(_visible(text), "dim")
        yield Segment("\n")
    else:
        yield from _turns(text, is_answer=False)


def _turns(turns: Turns, *, is_answer: bool) -> Iterator[Segment]:
    for turn in turns:
        weight = turn.get("weight", 1)
        shown = f", weight {weight:g}" if weight not in (0, 1) else ""
        yield Segment(f"[{turn['role']}{shown}] ", "dim")
        content = str(turn.get("content") or "")
        calls = str(turn.get("tool_calls") or "")
        words = _visible(" ".join(filter(None, (content, calls))))
        yield Segment(words, "counts" if is_answer and counts(turn) else "dim")
        yield Segment("\n")


def _tokens(
    ids: Sequence[int],
    mask: Sequence[float],
    behind: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> Iterator[Segment]:
    """Show tokens, without the middle of long lists; adjacent ones of one style are joined."""
    half = TOKENS // 2
    places = list(range(len(ids)))
    if len(ids) > TOKENS:
        places = [*places[:half], *places[-half:]]
    chunk: list[str] = []
    before = -1
    for place in places:
        is_gap = before >= 0 and place != before + 1
        if chunk and (is_gap or mask[place] != mask[before]):
            yield from _joined(chunk, mask[before])
            chunk = []
            gap = f" … {place - before - 1:,} tokens … " if is_gap else _BETWEEN
            yield Segment(gap)
        previous = ids[place - 1 : place] if place else behind
        chunk.append(_controls(_token(previous, ids[place], decode)))
        before = place
    if chunk:
        yield from _joined(chunk, mask[before])
    yield Segment("\n")


def _joined(tokens: Sequence[str], weight: float) -> Iterator[Segment]:
    """Show adjacent tokens of one weight, which is in front of them if it is not 0 or 1."""
    if weight not in (0, 1):
        yield Segment(f"×{weight:g} ".replace("-", "−"), "dim")
    yield Segment(_BETWEEN.join(tokens), "counts" if weight else "dim")


def _token(previous: Sequence[int], token: int, decode: Callable[[Sequence[int]], str]) -> str:
    """Decode a token after the previous one, which preserves its leading space."""
    before, both = decode(previous), decode([*previous, token])
    return both[len(before) :] if both.startswith(before) else decode([token])


def _visible(text: str) -> str:
    if len(text) > CHARACTERS:
        half = CHARACTERS // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]} … {left_out:,} characters … {text[-half:]}"
    return _controls(text)


def _controls(text: str) -> str:
    """Escape control characters, which could move a terminal's cursor."""
    return "".join(_CONTROLS.get(character, character) for character in text)


ROWS = 100
"""Rows that are inspected per file."""

_UNKNOWN_LABEL = "[E209] "
_SHOWN = 3  # most reasons for refusals that are shown


@dataclass(frozen=True, slots=True)
class FileInspection:
    """The result for one file.

    Attributes:
        name: The file.
        container: The detected container.
        rows: Number of inspected rows.
        detection: The detected format, and the reason.
        keys_read: Keys that were read.
        keys_unread: Keys that were not read.
        refusals: Refused rows.
        warnings: Number of kept rows per warning.
        example: The first record.
        shown: The first record, as segments.
        refused_formats: Formats of rows that were recognised and refused.
        imitated: A phrase about the rows that ``train --loss sft`` would read.
        is_wrapped: Whether plain text is wrapped as turns of a chat.
        values: How many completions have a score, rank, margin or weight, and their range.
        turn_weights: How many turns have a weight other than 0 and 1; None: no turn.
    """

    name: str
    container: str
    rows: int
    detection: Detection
    keys_read: tuple[str, ...]
    keys_unread: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    warnings: Mapping[str, int]
    example: PreferenceRecord | None
    shown: tuple[Segment, ...]
    refused_formats: tuple[str, ...] = ()
    imitated: str = ""
    is_wrapped: bool = False
    values: ValueCounts = field(default_factory=dict)
    turn_weights: WeightCounts | None = None

    @property
    def is_known(self) -> bool:
        """Whether every inspected row has a known format."""
        return bool(self.detection.counts) and not any(one.stops for one in self.refusals)

    def segments(self) -> Iterator[Segment]:
        """Yield the printed result, in styled segments."""
        known = self.detection
        yield Segment(f"{self.name}\n", "title")
        yield Segment(f"  container  {self.container}, {count(self.rows, 'row')} inspected\n")
        formats = " and ".join(known.counts or self.refused_formats)
        yield Segment(f"  format     {formats or 'unknown'}\n")
        yield Segment(f"  why        {known.reason}\n")
        if self.example:
            yield Segment(f"  becomes    {_becomes(self.example, self.is_wrapped)}\n")
        if self.imitated:
            yield Segment(f"  --loss sft {self.imitated}\n")
        if self.keys_read:
            yield Segment(f"  read       {', '.join(self.keys_read)}\n")
        if self.keys_unread:
            yield Segment(f"  not read   {', '.join(self.keys_unread)}\n")
        for line in to_lines(self.values):
            yield Segment(f"  values     {line}\n")
        if self.turn_weights:
            yield Segment(f"  values     {self.turn_weights}\n")
        for name, lacking in known.near.items():
            yield Segment(f"  similar    {name}, but it lacks {', '.join(lacking)}\n")
        for code, number in self.warnings.items():
            detail = f": {code.what}" if isinstance(code, Omitted) else ""
            yield Segment(f"  warning    [{code}] {number:,} × {CODES[code]}{detail}\n")
        yield from self._refused()
        yield from self.shown

    def _refused(self) -> Iterator[Segment]:
        """Yield each reason once, with its first row."""
        counted = Counter((refusal.code, refusal.reason) for refusal in self.refusals)
        for (code, reason), number in counted.most_common(_SHOWN):
            first = next(one for one in self.refusals if (one.code, one.reason) == (code, reason))
            more = f" (and {number - 1:,} more)" if number > 1 else ""
            yield Segment(f"  refused    {first}{more}\n", "fault")
        if len(counted) > _SHOWN:
            yield Segment(f"  refused    … for {len(counted) - _SHOWN:,} reasons more\n", "fault")


@dataclass(frozen=True, slots=True)
class Inspection:
    """The results for several files.

    Attributes:
        files: One result per file, in order.
    """

    files: tuple[FileInspection, ...]

    @property
    def is_known(self) -> bool:
        """Whether all files have known formats."""
        return all(file.is_known for file in self.files)

    def segments(self) -> Iterator[Segment]:
        """Yield the printed results, in styled segments."""
        for number, file in enumerate(self.files):
            if number:
                yield Segment("\n")
            yield from file.segments()

    def to_text(self) -> str:
        """Return the printed results without colours; trained text is enclosed in ‹ and ›."""
        return plain(self.segments())


def inspect(
    inputs: Inputs,
    settings: FormatSettings | None = None,
    tokenizer: PreferenceTokenizer | None = None,
    rows: int = ROWS,
) -> Inspection:
    """Inspect the first rows of files.

    Args:
        inputs: One input or several; see `logratio.data.readers.open_inputs`.
        settings: How to read the rows. None: the defaults.
        tokenizer: Shows the first record as tokens. None: as text.
        rows: Rows to inspect per file.

    Returns:
        One result per file.

    Raises:
        OSError: A file cannot be read.
    """
    opened = open_inputs(inputs, settings.reading if settings else None)
    return Inspection(tuple(_file(reader, settings, tokenizer, rows) for reader in opened))


def _file(
    reader: Rows, settings: FormatSettings | None, tokenizer: PreferenceTokenizer | None, limit: int
) -> FileInspection:
    settings = settings or FormatSettings()
    rows: list[tuple[Source, Row]] = []
    refusals: list[Refusal] = []
    looked_at = 0
    for source, row in islice(reader, limit):
        looked_at += source.line > 0  # line 0: a refusal of the whole file
        if isinstance(row, Refusal):
            refusals.append(row)
        else:
            rows.append((source, row))
    results, imitated = _tried(rows, settings), _tried(rows, replace(settings, demonstrations=True))
    is_imitated = not any(map(_is_read, results)) and any(map(_demonstrates, imitated))
    if is_imitated:
        results = imitated
    refusals += [
        Refusal(source, result.code, result.reason)
        for (source, _), result in zip(rows, results, strict=True)
        if isinstance(result, InvalidRecordError)
    ]
    decoded = [result for result in results if isinstance(result, Decoded)]
    encoded = _encoded(decoded, tokenizer)
    refusals += [group for group in encoded if isinstance(group, Refusal)]

    def by(one: Decoded) -> Iterator[str]:
        if tokenizer is None and any(is_rendered(record) for record in one.records):
            yield "W523"  # otherwise the tokenizer notes it, or refuses the row
        if tokenizer and tokenizer.bypasses_template and not one.is_chat:
            yield "W518"

    unread = dict.fromkeys(key for one in decoded for key in one.extra_keys)
    taken = (row for (_, row), one in zip(rows, results, strict=True) if _is_read(one))
    example = next((record for one in decoded for record in one.records), None)
    detection = summarize([row for _, row in rows], results, settings)
    # Advice from all values of the label replaces the advice from each row.
    if detection.reason.startswith(_UNKNOWN_LABEL):
        whole = detection.reason.removeprefix(_UNKNOWN_LABEL)
        refusals = [replace(one, reason=whole) if one.code == "E209" else one for one in refusals]
    return FileInspection(
        name=reader.name,
        container=reader.kind,
        rows=looked_at,
        detection=detection,
        keys_read=_without(taken, unread),
        keys_unread=tuple(unread),
        refusals=tuple(refusals),
        warnings=Counter(code for one in decoded for code in (*one.warnings, *by(one))),
        example=example,
        shown=_shown(example, encoded, tokenizer),
        is_wrapped=tokenizer is not None and tokenizer.wraps_text,
        refused_formats=_refused_formats(results),
        values=_counted(record for one in decoded for record in one.records),
        turn_weights=_turn_weights(record for one in decoded for record in one.records),
        imitated=_imitated(imitated, rows[0][1] if is_imitated else None),
    )


def _counted(records: Iterable[PreferenceRecord]) -> ValueCounts:
    every = [one.values for record in records for one in record.completions]
    return value_counts(np.array(every, np.float32).reshape(-1, len(VALUES)))


def _turn_weights(records: Iterable[PreferenceRecord]) -> WeightCounts | None:
    answers = [one.answer for record in records for one in record.completions]
    turns = [
        (float(turn.get("weight", 1)), number)
        for number, answer in enumerate(answers)
        if not isinstance(answer, str)
        for turn in answer
        if counts(turn)
    ]
    weights, owners = np.array(turns, np.float64).reshape(-1, 2).T
    return WeightCounts.of("turn", weights, owners.astype(np.int64))


def _tried(rows: Iterable[tuple[Source, Row]], settings: FormatSettings) -> list[Result]:
    decoder = Decoder(settings)
    return [try_row(decoder, row, source) for source, row in rows]


def _is_read(result: Result) -> bool:
    return isinstance(result, Decoded)


def _refused_formats(results: Sequence[Result]) -> tuple[str, ...]:
    found = [one.format for one in results if isinstance(one, InvalidRecordError) and one.format]
    return tuple(dict.fromkeys(found))


def _demonstrates(result: Result) -> bool:
    """Whether a row has nothing to compare its answer with, unlike a pair that is refused."""
    return isinstance(result, Decoded) and FORMATS[result.format].demonstrates


def _imitated(results: Sequence[Result], first: Row | None) -> str:
    """Describe the rows that ``train --loss sft`` reads; "" without any rows.

    Args:
        results: The rows, decoded as demonstrations.
        first: The first row, if the rows are only demonstrations; else None.
    """
    read = [one for one in results if isinstance(one, Decoded) and one.records]
    if not read:
        return "reads none of these rows" if results else ""
    answers = Counter(_imitates(one.format) for one in read)
    what = " and ".join(answers)
    only = ""
    if first is not None:
        only = f"; preference losses cannot use it{layouts.advice(first)}"
    stops = "" if IMITATES_BAD_TURNS else _stops(read)
    return f"reads {len(read):,} of {count(len(results), 'row')}: {what}{stops}{only}"


def _stops(read: Iterable[Decoded]) -> str:
    """Return why training stops at rows that SFT reads, if a turn has a weight below 0."""
    found = [weights for one in read if (weights := _turn_weights(one.records)) and weights.bad]
    if not found:
        return ""
    turns = "turn has" if (bad := sum(one.bad for one in found)) == 1 else "turns have"
    where = count(len(found), "row")
    return f"; training stops, because {bad:,} {turns} a weight below 0, in {where}"


def _imitates(name: str) -> str:
    """Return what SFT imitates in a row of a format."""
    if FORMATS[name].demonstrates:
        return "every answer of the chat" if name == "chat" else "the answer"
    return "the best answer" if FORMATS[name].family == "lists" else "the better answer"


def _without(rows: Iterable[Row], unread: Iterable[str]) -> tuple[str, ...]:
    names = dict.fromkeys(key for row in rows for key in row)
    return tuple(name for name in names if name not in set(unread))


def _encoded(
    decoded: Iterable[Decoded], tokenizer: PreferenceTokenizer | None
) -> list[TokenizedGroup | Refusal]:
    """Tokenize the records of all rows; empty without a tokenizer."""
    if tokenizer is None:
        return []
    return [*tokenizer.encode_records([record for one in decoded for record in one.records])]


def _shown(
    record: PreferenceRecord | None,
    encoded: Sequence[TokenizedGroup | Refusal],
    tokenizer: PreferenceTokenizer | None,
) -> tuple[Segment, ...]:
    """Show the first record, as tokens if it was tokenized."""
    if record is None:
        return ()
    if tokenizer is None or isinstance(encoded[0], Refusal):
        return tuple(show_record(record))
    return tuple(show_tokens(encoded[0], tokenizer.decode))


def _becomes(record: PreferenceRecord, is_wrapped: bool) -> str:
    roles = [completion.role for completion in record.completions]
    text = "messages, which the model's chat template renders"
    if is_wrapped and not record.is_chat:
        text = f"text, wrapped as a user turn and an assistant turn: {text}"
    elif not record.is_chat:
        text = "plain text, read unchanged; EOS follows each answer"
    if not record.ends:
        text += "; the answer is incomplete, so no EOS follows"
    return f"{', '.join(roles)}: {text}"
