"""What some rows of a file are, and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from logratio.data.containers import Row
from logratio.data.formats.catalogue import FORMATS, near_formats
from logratio.data.formats.decoder import Decoded, Decoder
from logratio.data.formats.families import holds_ids
from logratio.data.formats.labelled import untold
from logratio.data.formats.settings import FormatSettings
from logratio.data.formats.view import View
from logratio.data.layouts import advice
from logratio.data.records import InvalidRecordError, Source

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
