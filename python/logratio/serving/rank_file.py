"""`logratio rank`: read prompts and candidates from a file, write the rows with rewards."""

import errno
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from logratio.bundle import GRAPH, WEIGHTS, read_manifest
from logratio.data.conversations import prompt as check_turns
from logratio.data.readers.inputs import STDIN, open_file
from logratio.data.readers.json import json_type
from logratio.data.readers.rows import Row, Rows
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.data.store.row_report import BadDataError
from logratio.errors import IsFolderError
from logratio.forecast import Forecast, check_writable, count
from logratio.serving.candidates import CandidateGroup
from logratio.serving.reranker import Reranker, Score, ranked

_BYTES_PER_TOKEN = 4.0
"""Approximate value for English text."""
_COMPRESSION = 3.0
_SIDE, _EFFICIENCY, _PROCESS_BYTES = 512, 0.5, 0.4e9


def rank_forecast(bundle: str | Path, input_file: str | Path, output: Path | None) -> Forecast:
    """Estimate the time, memory and disk space of `rank_file`.

    Args:
        bundle: The bundle's folder.
        input_file: The file to rank, or "-" for standard input, whose length is unknown: then only
            the memory is estimated.
        output: The output file; None for standard output.

    Raises:
        BundleError: The folder is not a bundle.
        OSError: The input cannot be read, or the output not written.
    """
    if output:
        check_writable(output.parent)
    files = read_manifest(Path(bundle)).files
    weights = float(sum(files[name].size for name in (GRAPH, WEIGHTS) if name in files))
    is_stdin = str(input_file) == STDIN
    packed = str(input_file).endswith(("gz", "zst"))
    text = 0.0 if is_stdin else Path(input_file).stat().st_size * (_COMPRESSION if packed else 1)
    tokens = text / _BYTES_PER_TOKEN
    flops = 2 * weights / np.dtype(np.float32).itemsize * tokens
    return Forecast(
        memory_bytes=_PROCESS_BYTES + 2 * weights,
        disk_bytes=2 * text if output else 0,
        disk_path=output or Path(),
        seconds=flops / (_EFFICIENCY * _flops_per_second()),
        notes="time and disk depend on the length of standard input"
        if is_stdin
        else f"about {tokens:,.0f} tokens",
    )


def _flops_per_second() -> float:
    left = np.ones((_SIDE, _SIDE), dtype=np.float32)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        left @ left
        count += 1
    return 2 * _SIDE**3 * count / (time.perf_counter() - start)


ROWS = 64
"""Rows scored together; rows of similar lengths share runs of the graph."""

Progress = Callable[[int, int, int], None]
"""Called with the rows done, the bytes read and the total bytes."""


@dataclass(slots=True)
class RankSummary:
    """Counts of a ranked file.

    Attributes:
        rows: Rows read and written.
        candidates: Candidates with a reward.
        failed_candidates: Candidates without a reward, because they are empty or too long.
        failed_rows: Number of rows that could not be ranked, by code.
    """

    rows: int = 0
    candidates: int = 0
    failed_candidates: int = 0
    failed_rows: dict[str, int] = field(default_factory=dict)

    def to_text(self) -> str:
        """Return the summary as one line of text."""
        ranked_rows = self.rows - sum(self.failed_rows.values())
        text = (
            f"{count(ranked_rows, 'prompt')} ranked, {count(self.candidates, 'candidate')} with a "
            "reward"
        )
        if self.failed_candidates:
            text += f", {self.failed_candidates:,} without (see `errors`)"
        for code, number in sorted(self.failed_rows.items()):
            text += f"; [{code}] {count(number, 'row')} refused (see `error`)"
        return text


def rank_file(
    reranker: Reranker,
    input: str | Path,
    output: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> RankSummary:
    """Score every row of a JSON lines file, in order and in constant memory.

    A row is ``{"prompt": text or chat messages, "candidates": [text, …]}``; the file may be
    compressed (gzip, zstd).
    Each row is written with its keys and, per candidate, ``rewards`` and ``tokens`` (null rewards
    for candidates that cannot be scored), ``policy_logps`` and ``reference_logps`` in nats (not
    from a reward model), and
    ``order``: the indexes, best first. ``errors`` gives the reasons by index. A row that cannot be
    ranked, because it is malformed or its prompt is invalid, only gets ``error``.

    Args:
        reranker: The loaded bundle.
        input: The file to read; "-" for standard input.
        output: The file to write, which appears when complete; None or "-" for standard output.
        progress: Called after each batch.

    Returns:
        The counts of rows and candidates.

    Raises:
        BadDataError: The file has no rows, or is of an unsupported type. No output file is left.
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


Item = tuple[Row, InvalidRecordError | None]
"""A row of the input, and why it cannot be ranked, if so; a row that is not JSON is empty."""
_OF_THE_FILE = ("E106", "E112")
"""Codes of files without rows."""


def _batches(lines: Rows) -> Iterator[list[Item]]:
    batch = []
    for source, row in lines:
        batch.append(_checked(row, source))
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _checked(row: Row | Refusal, source: Source) -> Item:
    """Check that a row has a prompt and candidates.

    Raises:
        BadDataError: The row stands for a whole file that has no rows.
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


def _rank(reranker: Reranker, batch: list[Item], summary: RankSummary) -> Iterator[Row]:
    """Yield each row with its scores."""
    encoded = [error or _encode(reranker, row) for row, error in batch]
    groups = [group for group in encoded if isinstance(group, CandidateGroup)]
    scored = iter(reranker.score_groups(groups))
    for (row, _), group in zip(batch, encoded, strict=True):
        summary.rows += 1
        if isinstance(group, InvalidRecordError):
            codes = summary.failed_rows
            codes[group.code] = codes.get(group.code, 0) + 1
            yield row | {"error": str(group)}
        else:
            scores = next(scored)
            failed = sum(score.error is not None for score in scores)
            summary.failed_candidates += failed
            summary.candidates += len(scores) - failed
            yield row | _columns(scores, scored=reranker.manifest.is_reward_model)


def _encode(reranker: Reranker, row: Row) -> CandidateGroup | InvalidRecordError:
    try:
        return reranker.encode(row["prompt"], row["candidates"])
    except InvalidRecordError as error:
        return error


def _columns(scores: list[Score], *, scored: bool) -> dict[str, Any]:
    """Return the columns of a row; those of a reward model have no log-probs."""
    columns: dict[str, Any] = {
        "rewards": [_number(score.reward) for score in scores],
        "order": [score.index for score in ranked(scores) if score.error is None],
    }
    if not scored:
        columns["policy_logps"] = [_number(score.policy_logps) for score in scores]
        columns["reference_logps"] = [_number(score.reference_logps) for score in scores]
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


@contextmanager
def _open_output(path: Path | None) -> Iterator[IO[str]]:
    """Open standard output, or a partial file that is renamed to `path` on success."""
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
