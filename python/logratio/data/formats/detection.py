"""What some rows of a file are, and why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from logratio.data.formats.catalogue import FORMATS, near_formats
from logratio.data.formats.decoder import Decoded, Decoder
from logratio.data.formats.settings import FormatSettings
from logratio.data.reading import Row
from logratio.data.records import InvalidRecordError, Source

_SAMPLE = "these rows"
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
    results: list[Decoded | InvalidRecordError] = []
    for line, row in enumerate(rows, 1):
        try:
            results.append(decoder.decode(row, Source(_SAMPLE, line)))
        except InvalidRecordError as error:
            results.append(error)
    return summarize(rows, results)


def summarize(rows: Sequence[Row], results: Sequence[Decoded | InvalidRecordError]) -> Detection:
    """Say what rows are that were decoded, or refused, one by one."""
    counts = Counter(result.format for result in results if isinstance(result, Decoded))
    refused = Counter(str(result) for result in results if isinstance(result, InvalidRecordError))
    near: dict[str, tuple[str, ...]] = {}
    if not counts:
        names = list(dict.fromkeys(key for row in rows for key in row if row[key] is not None))
        near = {known.name: lacking for known, lacking in near_formats(names)}
        near = dict(list(near.items())[:_NEAR])
    name = next(iter(counts)) if len(counts) == 1 else None
    return Detection(name, _reason(counts, refused), counts, refused, near)


def _reason(counts: Counter[str], refused: Counter[str]) -> str:
    if not counts:
        return refused.most_common(1)[0][0] if refused else "there is no row to look at"
    told = [f"{FORMATS[name].title} ({number:,} rows)" for name, number in counts.most_common()]
    if len(counts) == 1:
        told = [FORMATS[name].title for name in counts]
    return "; ".join(told)
