"""The output of `logratio rank`: standard output, or a file that a later run can complete."""

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from logratio.data.readers.arrow_library import arrow
from logratio.durable import lock, published, sync, write_atomic
from logratio.errors import ConfigError, IsFolderError
from logratio.forecast import check_writable
from logratio.progress import say
from logratio.serving.rank_rows import RankSummary, flat

EVERY = 10.0
"""Seconds between two checkpoints."""
PARQUET = ".parquet"
"""Suffix of an output in Parquet; any other is JSON lines."""
_OTHERS = {".arrow", ".csv", ".feather", ".gz", ".tsv", ".xlsx", ".zst"}
"""Suffixes of types that are not written."""
_ROWS = 4096
"""Rows converted to Parquet together."""


@dataclass(frozen=True, slots=True)
class Position:
    """What a later run needs in order to continue.

    Attributes:
        identity: The input, the bundle and its cache, which must be equal in the later run.
        mark: Position in the input, from `Rows.mark`.
        length: Bytes of output up to it.
        summary: The counts up to it, as a dict.
    """

    identity: Mapping[str, Any]
    mark: Mapping[str, Any]
    length: int
    summary: Mapping[str, Any]


class Output(Protocol):
    """Where ranked rows go."""

    @property
    def begins(self) -> Position | None:
        """The position of an unfinished run that this one continues; None: the first row."""

    def write(self, lines: str, mark: Mapping[str, Any], summary: RankSummary) -> None:
        """Write the rows up to a mark of the input, with the counts of all rows so far."""


class StandardOutput:
    """Writes each batch at once, so that another program can read it."""

    begins = None

    def write(self, lines: str, mark: Mapping[str, Any], summary: RankSummary) -> None:
        """Write rows; the position is not recorded."""
        sys.stdout.write(lines)
        sys.stdout.flush()


class FileOutput:
    """Appends to a partial file, and records how far the input is ranked.

    A later call with the same input, bundle and cache continues after the last recorded position,
    also after a crash: rows are on disk before their position is.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Open the partial file of an output.

        Args:
            path: The finished file.
            identity: The input, the bundle and its cache.

        Raises:
            ConfigError: Another process is writing this output.
            OSError: The file cannot be written.
        """
        self._path, self._identity = path, dict(identity)
        self._partial = path.with_name(f".{path.name}.partial")
        self._progress = path.with_name(f".{path.name}.progress")
        self._file = self._partial.open("ab")
        try:
            self._lock()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"another process is ranking into {path}") from None
        self.begins = self._recorded()
        if self.begins is None:  # after a crash, an old position must not name other rows
            if self._progress.exists():
                say(
                    f"{path}: begins again; the unfinished run had another input, bundle, cache or "
                    "--truncate, or its record is damaged"
                )
            self._progress.unlink(missing_ok=True)
        self._file.truncate(self.begins.length if self.begins else 0)
        self._last: tuple[Mapping[str, Any], RankSummary] | None = None
        self._saved = time.monotonic()

    def _lock(self) -> None:
        """Lock the partial file, which another process may have just given its final name.

        Raises:
            BlockingIOError: Another process has it.
        """
        lock(self._file.fileno())
        try:
            is_same = os.path.samestat(os.fstat(self._file.fileno()), self._partial.stat())
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise BlockingIOError

    def _recorded(self) -> Position | None:
        """Return the position of an unfinished run with the same identity."""
        try:
            position = Position(**json.loads(self._progress.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        is_whole = position.length <= self._partial.stat().st_size
        return position if is_whole and position.identity == self._identity else None

    def write(self, lines: str, mark: Mapping[str, Any], summary: RankSummary) -> None:
        """Append rows; every `EVERY` seconds, record the position."""
        self._file.write(lines.encode("utf-8", "surrogatepass"))
        self._last = mark, summary
        if time.monotonic() - self._saved >= EVERY:
            self.save()

    def save(self) -> None:
        """Make the rows durable, then their position."""
        if self._last is None:
            return
        mark, summary = self._last
        self._file.flush()
        sync(self._partial)
        position = Position(self._identity, mark, self._file.tell(), asdict(summary))
        write_atomic(self._progress, json.dumps(asdict(position)))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Give the complete output its name."""
        self._file.flush()
        sync(self._partial)
        if self._path.suffix == PARQUET:
            with published(self._path) as table:
                to_parquet(self._partial, table)
            self._partial.unlink()
        else:
            self._partial.replace(self._path)
        self._progress.unlink(missing_ok=True)
        sync(self._path.parent)

    def stop(self) -> None:
        """Keep what is ranked for a later run; without any row, leave no file."""
        if self._last is None and self.begins is None:
            self._partial.unlink(missing_ok=True)
            self._progress.unlink(missing_ok=True)
        else:
            self.save()
            say(f"{self._path}: what is ranked is kept, and the same command continues")

    def close(self) -> None:
        """Close the partial file, and with it the lock."""
        self._file.close()


@contextmanager
def open_output(path: Path | None, identity: Mapping[str, Any]) -> Iterator[Output]:
    """Open standard output, or a file that gets its name on success.

    Args:
        path: The file; None: standard output.
        identity: The input, the bundle and its cache, which an unfinished run must share to be
            continued.

    Raises:
        ConfigError: Another process is writing the file.
        OSError: The file cannot be written.
    """
    if path is None:
        yield StandardOutput()
        return
    if path.is_dir():
        raise IsFolderError(errno.EISDIR, "Is a folder; name a file", str(path))
    if path.suffix in _OTHERS:
        raise ConfigError(f"{path}: the output is JSON lines, or Parquet if it ends in {PARQUET}")
    if path.suffix == PARQUET:
        arrow("Parquet")
    check_writable(path.parent)
    output = FileOutput(path, identity)
    try:
        yield output
        output.finish()
    except BaseException:
        output.stop()
        raise
    finally:
        output.close()


def to_parquet(lines: Path, table: Path) -> None:
    """Convert JSON lines to Parquet, in constant memory.

    `errors`, a mapping from an index to a reason, becomes a list of structs.

    Raises:
        ConfigError: A column has values of types that one column cannot hold.
    """
    library = arrow("Parquet")
    try:
        schemas = [one.schema for one in _tables(library, lines, None)]
        schema = library.unify_schemas(schemas, promote_options="permissive")
        with library.parquet.ParquetWriter(table, schema) as writer:
            for one in _tables(library, lines, schema):
                writer.write_table(one)
    except (
        library.ArrowInvalid,
        library.ArrowTypeError,
        library.ArrowNotImplementedError,
    ) as error:
        raise ConfigError(
            f"the rows do not fit a Parquet table ({error}): write JSON lines"
        ) from error


def _tables(library: Any, lines: Path, schema: Any) -> Iterator[Any]:
    """Yield tables of some rows each, with all keys of these rows as columns."""
    with lines.open(encoding="utf-8") as file:
        while rows := [flat(json.loads(line)) for line in islice(file, _ROWS)]:
            names = schema.names if schema else dict.fromkeys(name for row in rows for name in row)
            columns = {name: [row.get(name) for row in rows] for name in names}
            yield library.Table.from_pydict(columns, schema)
