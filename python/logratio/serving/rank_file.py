"""`logratio rank`: read prompts and candidates from a stream, write the rows with rewards."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from logratio.bundle import GRAPH, WEIGHTS, read_manifest
from logratio.data.readers.inputs import STDIN, open_file
from logratio.data.readers.rows import Rows
from logratio.forecast import Forecast, check_writable
from logratio.progress import say
from logratio.serving.rank_output import open_output
from logratio.serving.rank_rows import Item, RankSummary, checked, score_rows
from logratio.serving.rank_workers import Scored, Workers
from logratio.serving.reranker import Reranker
from logratio.serving.shared_base import check_base
from logratio.validation import PATH, check_argument

_BYTES_PER_TOKEN = 4.0
"""Approximate value for English text."""
_COMPRESSION = 3.0
_SIDE, _EFFICIENCY, _PROCESS_BYTES = 512, 0.5, 0.4e9


def rank_forecast(
    bundle: str | Path,
    input_file: str | Path,
    output: Path | None,
    workers: int = 1,
    *,
    base: str | Path | None = None,
) -> Forecast:
    """Estimate the time, memory and disk space of `rank_file`.

    Args:
        bundle: The bundle's folder.
        input_file: The file to rank, or "-" for standard input, whose length is unknown: then only
            the memory is estimated.
        output: The output file; None for standard output.
        workers: Processes that each load the bundle.
        base: The bundle of its base, if it is an adapter.

    Raises:
        BundleError: The folder is not a bundle.
        OSError: The input cannot be read, or the output not written.
    """
    if output:
        check_writable(output.parent)
    check_base(Path(bundle), manifest := read_manifest(bundle), base)
    files = manifest.files if base is None else read_manifest(base).files
    weights = float(sum(files[name].size for name in (GRAPH, WEIGHTS) if name in files))
    is_stdin = str(input_file) == STDIN
    packed = str(input_file).endswith(("gz", "zst"))
    text = 0.0 if is_stdin else Path(input_file).stat().st_size * (_COMPRESSION if packed else 1)
    tokens = text / _BYTES_PER_TOKEN
    runs = 1 if base is None else 2
    flops = runs * 2 * weights / np.dtype(np.float32).itemsize * tokens
    return Forecast(
        memory_bytes=workers * (_PROCESS_BYTES + 2 * weights),
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

Progress = Callable[[RankSummary, int, int], None]
"""Called with the counts so far, the bytes read and the total bytes."""


class Batch(NamedTuple):
    """Some rows of the input.

    Attributes:
        items: The rows.
        mark: Position in the input after them.
        position: Bytes read up to it.
    """

    items: list[Item]
    mark: Mapping[str, Any]
    position: int


def rank_file(
    reranker: Reranker | Workers,
    input: str | Path,
    output: str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> RankSummary:
    """Score every row of a file, in order and in constant memory.

    A row is ``{"prompt": text or chat messages, "candidates": [text, …]}``; the file is of any
    type that `--data` reads: JSON lines, Parquet, …, also compressed. For a bundle that takes the
    reference's log-probs as an input, a row also has ``reference_logps``, one number per candidate,
    unless the reranker has a cache.
    Each row is written with its keys and, per candidate, ``rewards`` and ``tokens`` (null rewards
    for candidates that cannot be scored), ``policy_logps`` and ``reference_logps`` in nats (not
    from a reward model), and
    ``order``: the indexes, best first. ``errors`` gives the reasons by index. A row that cannot be
    ranked, because it is malformed, its prompt is invalid or the graph fails for it, only gets
    ``error``.

    A call that is interrupted leaves its rows in a partial file next to `output`. The same call
    continues after them, unless the input, the bundle or the cache has changed.

    Args:
        reranker: The loaded bundle, or processes that load it.
        input: The file to read; "-" for standard input, which cannot be continued.
        output: The file to write, which appears when complete: Parquet if its name ends in
            ``.parquet``, else JSON lines. None or "-": JSON lines on standard output.
        progress: Called after each batch.

    Returns:
        The counts of rows and candidates, including those of the run that is continued.

    Raises:
        BadDataError: The file has no rows, or is of an unsupported type. No output file is left.
        GraphRunError: The graph fails for the first `MOST_FAILED` rows of a batch; the rows before
            it are kept for the same call.
        ConfigError: Another process is writing the output, or its rows do not fit a Parquet table.
        SettingTypeError: An argument has the wrong type.
        OSError: A file cannot be read or written.
    """
    check_argument("reranker", Reranker | Workers, reranker)
    check_argument("input", PATH, input)
    check_argument("output", PATH | None, output)
    rows = open_file(Path(input))
    path = None if output in (None, "-") else Path(str(output))
    with open_output(path, _identity(reranker, input)) as out:
        summary = RankSummary()
        if out.begins:
            summary = RankSummary(**out.begins.summary)
            rows.resume_from(dict(out.begins.mark))
            say(f"{path}: continues after {summary.rows:,} rows")
        with closing(_scored(reranker, _batches(rows))) as scored:  # workers end here
            for batch, (lines, counts) in scored:
                summary.add(counts)
                out.write(lines, batch.mark, summary)
                if progress:
                    progress(summary, batch.position, rows.size or 0)
    return summary


def _identity(reranker: Reranker | Workers, input: str | Path) -> dict[str, Any]:
    """Return what an unfinished run must share to be continued.

    Standard input is never equal to that of an earlier run.
    """
    path = Path(input)
    if not path.is_file():
        return {"input": STDIN, "started": time.time_ns()}
    stat = path.stat()
    return {
        "input": str(path.resolve()),
        "size": stat.st_size,
        "modified": stat.st_mtime_ns,
        "bundle": hashlib.sha256(repr(reranker.manifest).encode()).hexdigest(),
        "truncates": reranker.truncates,
        "cache": list(reranker.cached.state) if reranker.cached else None,
    }


def _batches(rows: Rows) -> Iterator[Batch]:
    items = []
    for source, row in rows:
        items.append(checked(row, source))
        if len(items) == ROWS:
            yield Batch(items, rows.mark(), rows.position)
            items = []
    if items:
        yield Batch(items, rows.mark(), rows.position)


def _scored(
    reranker: Reranker | Workers, batches: Iterator[Batch]
) -> Generator[tuple[Batch, Scored], None, None]:
    """Yield each batch with its results; workers read ahead of them."""
    if isinstance(reranker, Reranker):
        for batch in batches:
            yield batch, score_rows(reranker, batch.items)
        return
    read: deque[Batch] = deque()

    def items() -> Iterator[list[Item]]:
        for batch in batches:
            read.append(batch)
            yield batch.items

    for scored in reranker.score(items()):
        yield read.popleft(), scored
