"""One row of `logratio rank`: check it, score its candidates, add the result's columns."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from logratio.bundle import CACHED_REFERENCE, REFERENCE_FREE, REWARD_MODEL
from logratio.data.conversations import prompt as check_turns
from logratio.data.readers.json import json_type
from logratio.data.readers.rows import Row
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.data.store.row_report import BadDataError
from logratio.errors import ConfigError
from logratio.forecast import count
from logratio.serving.candidates import CandidateGroup
from logratio.serving.reranker import GraphRunError, Reranker
from logratio.serving.scores import Score, ranked


@dataclass(slots=True)
class RankSummary:
    """Counts of a ranked file.

    Attributes:
        rows: Rows read and written.
        candidates: Candidates with a reward.
        failed_candidates: Candidates without a reward, because they are empty or too long.
        failed_rows: Number of rows that could not be ranked, by code.
        empty_rows: Number of rows without any reward, although each could be read.
    """

    rows: int = 0
    candidates: int = 0
    failed_candidates: int = 0
    failed_rows: dict[str, int] = field(default_factory=dict)
    empty_rows: int = 0

    @property
    def unranked(self) -> int:
        """Number of rows that have no order."""
        return sum(self.failed_rows.values()) + self.empty_rows

    def add(self, other: "RankSummary") -> None:
        """Add the counts of more rows."""
        self.rows += other.rows
        self.candidates += other.candidates
        self.failed_candidates += other.failed_candidates
        self.empty_rows += other.empty_rows
        for code, number in other.failed_rows.items():
            self.failed_rows[code] = self.failed_rows.get(code, 0) + number

    def to_text(self) -> str:
        """Return the summary as one line of text."""
        ranked_rows = self.rows - self.unranked
        text = (
            f"{count(ranked_rows, 'prompt')} ranked, {count(self.candidates, 'candidate')} with a "
            "reward"
        )
        if self.failed_candidates:
            text += f", {self.failed_candidates:,} without (see `errors`)"
        if self.empty_rows:
            text += f"; {count(self.empty_rows, 'prompt')} without any reward"
        for code, number in sorted(self.failed_rows.items()):
            text += f"; [{code}] {count(number, 'row')} refused (see `error`)"
        return text


REFERENCE = "reference_logps"
"""The key of the reference's log-probs, in rows read and written."""
Item = tuple[Row, InvalidRecordError | None]
"""A row of the input, and why it cannot be ranked, if so; a row that is not JSON is empty."""
MOST_FAILED = 8
"""If the graph fails for the first rows of a batch, as many as this, and scores none of them, the
session is broken or memory is exhausted: the run ends, instead of writing an error to every row."""
_OF_THE_FILE = ("E106", "E112")
"""Codes of files without rows."""


def checked(row: Row | Refusal, source: Source) -> Item:
    """Check that a row has a prompt and candidates.

    Raises:
        BadDataError: A whole file has no rows.
    """
    if isinstance(row, Refusal):
        if row.code in _OF_THE_FILE:
            raise BadDataError("nothing can be ranked:", (str(row),))
        return {}, InvalidRecordError(row.code, f"{row.source}: {row.reason}")
    try:
        _check_prompt(row)
        _check_candidates(row)
    except InvalidRecordError as error:
        return row, InvalidRecordError(error.code, f"{source}: {error.reason}")
    return row, None


def _check_prompt(row: Row) -> None:
    prompt = _value(row, "prompt")
    if isinstance(prompt, list):
        check_turns(prompt, "prompt")
    elif not isinstance(prompt, str):
        raise InvalidRecordError("E203", f"'prompt' is {json_type(prompt)}, not text or messages")


def _check_candidates(row: Row) -> None:
    candidates = _value(row, "candidates")
    if not isinstance(candidates, list):
        raise InvalidRecordError("E203", f"'candidates' is {json_type(candidates)}, not a list")
    if not candidates:
        raise InvalidRecordError("R318", "'candidates' is empty")
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, str):
            is_a = json_type(candidate)
            raise InvalidRecordError("E203", f"candidate {number} is {is_a}, not a string")


def _value(row: Row, key: str) -> Any:
    if key not in row:
        wanted = '{"prompt": text or messages, "candidates": [text, …]}'
        raise InvalidRecordError("E201", f"no {key!r}; a row is {wanted}")
    if row[key] is None:
        raise InvalidRecordError("E202", f"{key!r} is null")
    return row[key]


def score_rows(reranker: Reranker, items: list[Item]) -> tuple[str, RankSummary]:
    """Score some rows together.

    Returns:
        The rows with their results as JSON lines, in order, and their counts.
    """
    summary = RankSummary()
    rows = ranked_rows(reranker, items, summary)
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    return "".join(lines), summary


def ranked_rows(reranker: Reranker, items: list[Item], summary: RankSummary) -> Iterator[Row]:
    """Score some rows together; yield each with its results, and count it in `summary`.

    Raises:
        GraphRunError: The graph fails for each of the first `MOST_FAILED` rows.
    """
    encoded = [error or _encode(reranker, row) for row, error in items]
    groups = [group for group in encoded if isinstance(group, CandidateGroup)]
    scored = iter(_scored(reranker, groups))
    for (row, _), group in zip(items, encoded, strict=True):
        summary.rows += 1
        scores = group if isinstance(group, InvalidRecordError) else next(scored)
        if isinstance(scores, InvalidRecordError):
            codes = summary.failed_rows
            codes[scores.code] = codes.get(scores.code, 0) + 1
            yield row | {"error": str(scores)}
        else:
            failed = sum(score.error is not None for score in scores)
            summary.failed_candidates += failed
            summary.candidates += len(scores) - failed
            summary.empty_rows += failed == len(scores)
            yield row | _columns(scores, reranker.manifest.graph.kind)


def _scored(
    reranker: Reranker, groups: list[CandidateGroup]
) -> list[list[Score] | InvalidRecordError]:
    """Score some rows together; if a run fails, each alone, so that only those at fault fail."""
    try:
        return [*reranker.score_groups(groups)]
    except GraphRunError:
        pass
    found: list[list[Score] | InvalidRecordError] = []
    for group in groups:
        try:
            found += reranker.score_groups([group])
        except GraphRunError as error:
            found.append(InvalidRecordError("E605", str(error)))
            if len(found) >= MOST_FAILED and not any(isinstance(one, list) for one in found):
                raise
    return found


def _encode(reranker: Reranker, row: Row) -> CandidateGroup | InvalidRecordError:
    try:
        return reranker.encode(row["prompt"], row["candidates"], _reference(reranker, row))
    except InvalidRecordError as error:
        return error
    except ConfigError as error:  # the reference's log-probs are missing or not those of the row
        return InvalidRecordError("E203" if REFERENCE in row else "E201", str(error))


def _reference(reranker: Reranker, row: Row) -> list[float | None] | None:
    """Return the reference's log-probs of a row, if the graph takes them."""
    if reranker.manifest.graph.kind != CACHED_REFERENCE or REFERENCE not in row:
        return None
    values = row[REFERENCE]
    if not isinstance(values, list):
        raise InvalidRecordError("E203", f"{REFERENCE!r} is {json_type(values)}, not a list")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise InvalidRecordError("E203", f"{REFERENCE!r} contains {json_type(value)}")
    return values


def _columns(scores: list[Score], kind: str) -> dict[str, Any]:
    """Return the columns of a row: only those log-probs that the reward is made of."""
    columns: dict[str, Any] = {
        "rewards": [_number(score.reward) for score in scores],
        "order": [score.index for score in ranked(scores) if score.error is None],
    }
    if kind != REWARD_MODEL:
        columns["policy_logps"] = [_number(score.policy_logps) for score in scores]
    if kind not in (REWARD_MODEL, REFERENCE_FREE):
        columns[REFERENCE] = [_number(score.reference_logps) for score in scores]
    columns["tokens"] = [score.tokens for score in scores]
    errors = {str(score.index): score.error for score in scores if score.error is not None}
    truncated = [score.index for score in scores if score.truncated]
    return (
        columns
        | ({"errors": errors} if errors else {})
        | ({"truncated": truncated} if truncated else {})
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def flat(row: Row) -> Row:
    """Return a row for a table: `errors`, a mapping from index to reason, as a list of structs."""
    errors = row.get("errors")
    if isinstance(errors, dict):
        row["errors"] = [{"index": int(at), "error": reason} for at, reason in errors.items()]
    return row
