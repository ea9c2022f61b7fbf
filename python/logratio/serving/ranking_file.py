"""`logratio rank`: a file of prompts and candidates in, the same rows with rewards out."""

import errno
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from logratio.data import BadDataError, InvalidRecordError, Refusal, Source
from logratio.data.containers import Row, Rows, json_type, open_file
from logratio.data.conversations import prompt as check_turns
from logratio.errors import IsFolderError
from logratio.serving.candidates import CandidateGroup
from logratio.serving.reranker import Reranker, Score, ranked

ROWS = 64
"""Rows scored together, so that those of similar lengths share runs of the graph."""

Progress = Callable[[int, int, int], None]
"""Called with rows done, bytes read and bytes in all."""


@dataclass(slots=True)
class RankSummary:
    """What became of a file's rows.

    Attributes:
        rows: Rows written.
        candidates: Candidates with a reward.
        failed_candidates: Candidates without: empty, or too long.
        failed_prompts: Rows whose prompt could not be taken, by code.
    """

    rows: int = 0
    candidates: int = 0
    failed_candidates: int = 0
    failed_prompts: dict[str, int] = field(default_factory=dict)

    def to_text(self) -> str:
        """Tell it to a person."""
        text = f"{self.rows:,} prompts, {self.candidates:,} candidates with a reward"
        if self.failed_candidates:
            text += f", {self.failed_candidates:,} without (see `errors`)"
        for code, count in sorted(self.failed_prompts.items()):
            text += f"; [{code}] {count:,} prompts not taken (see `error`)"
        return text


def rank_file(
    reranker: Reranker,
    input: str | Path,
    output: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> RankSummary:
    """Score every row of a JSON lines file, in its order, in constant memory.

    A row is ``{"prompt": text or chat messages, "candidates": [text, …]}``, plain or gzip; other
    keys pass through. It is written back with ``rewards`` (null without one), ``order`` (indexes,
    the best first), ``policy_logps``, ``reference_logps`` and ``tokens``, with ``errors`` by index
    where candidates have no reward, and with ``error`` alone where the prompt cannot be taken.

    Args:
        reranker: The loaded bundle.
        input: The file to read.
        output: The file to write, which appears once it is complete; None or "-": the screen.
        progress: Told after each batch how far it is.

    Raises:
        BadDataError: A row is malformed; names file, line and code. No output file is left.
        OSError: A file cannot be read or written.
    """
    lines = open_file(Path(input))
    summary = RankSummary()
    with _open_output(None if output in (None, "-") else Path(str(output))) as file:
        for batch in _batches(lines):
            for row in _rank(reranker, batch, summary):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if progress:
                progress(summary.rows, lines.position, lines.size or 0)
    return summary


def _batches(lines: Rows) -> Iterator[list[Row]]:
    batch = []
    for source, row in lines:
        if isinstance(row, Refusal):
            raise BadDataError("a row cannot be ranked:", (str(row),))
        batch.append(_checked(row, source))
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _checked(row: Row, source: Source) -> Row:
    """Return a row that has a prompt and candidates.

    Raises:
        BadDataError: It has not; names file, line and code.
    """
    try:
        _check_prompt(row)
        _check_candidates(row)
    except InvalidRecordError as error:
        refusal = Refusal(source, error.code, error.reason)
        raise BadDataError("a row cannot be ranked:", (str(refusal),)) from None
    return row


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
        raise InvalidRecordError("E203", "'candidates' is empty")
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


def _rank(reranker: Reranker, batch: list[Row], summary: RankSummary) -> Iterator[Row]:
    """Yield each row with what it got."""
    encoded = [_encode(reranker, row) for row in batch]
    groups = [group for group in encoded if isinstance(group, CandidateGroup)]
    scored = iter(reranker.score_groups(groups))
    for row, group in zip(batch, encoded, strict=True):
        summary.rows += 1
        if isinstance(group, InvalidRecordError):
            codes = summary.failed_prompts
            codes[group.code] = codes.get(group.code, 0) + 1
            yield row | {"error": str(group)}
        else:
            scores = next(scored)
            failed = sum(score.error is not None for score in scores)
            summary.failed_candidates += failed
            summary.candidates += len(scores) - failed
            yield row | _columns(scores)


def _encode(reranker: Reranker, row: Row) -> CandidateGroup | InvalidRecordError:
    try:
        return reranker.encode(row["prompt"], row["candidates"])
    except InvalidRecordError as error:
        return error


def _columns(scores: list[Score]) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "rewards": [_number(score.reward) for score in scores],
        "order": [score.index for score in ranked(scores) if score.error is None],
        "policy_logps": [_number(score.policy_logps) for score in scores],
        "reference_logps": [_number(score.reference_logps) for score in scores],
        "tokens": [score.tokens for score in scores],
    }
    errors = {str(score.index): score.error for score in scores if score.error is not None}
    truncated = [score.index for score in scores if score.truncated]
    return (
        columns
        | ({"errors": errors} if errors else {})
        | ({"truncated": truncated} if truncated else {})
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _open_output(path: Path | None) -> Iterator[IO[str]]:
    """Open the screen, or a file beside `path` that becomes `path` when all went well."""
    if path is None:
        yield sys.stdout
        return
    if path.is_dir():
        raise IsFolderError(errno.EISDIR, "Is a folder; name a file", str(path))
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
