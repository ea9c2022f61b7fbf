"""Build a store from inputs in one resumable pass, and report on every row."""

import errno
import glob
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, StoreWriter
from logratio.data.formats.decoder import Decoder
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.inputs import Inputs, Opened, open_inputs
from logratio.data.records import CODES, Refusal, Source
from logratio.data.store import turn_weights
from logratio.data.store.id_columns import NAMES
from logratio.data.store.ingest import Intake
from logratio.data.store.row_report import BadDataError, DataReport, Ledger, write_refusal
from logratio.data.store.value_counts import value_counts
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError, InputError
from logratio.validation import Range, check_argument, check_fields

if TYPE_CHECKING:
    import pyarrow

EVERY = 10.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True, slots=True)
class Position:
    """The state that a resumed run needs.

    Attributes:
        identity: Inputs and settings, which must be equal in the resumed run.
        input: Index of the current container.
        mark: Position in it, from `Rows.mark`.
        report: The counts so far, from `DataReport.to_dict`.
        decoder: The first row of each file, from `Decoder.state`.
        files: Names of the containers, ordered by number.
        log_bytes: Length of the list of refused rows.
        turn_weights: The weights of turns so far, from `TurnWeights.values`.
    """

    identity: Mapping[str, Any]
    input: int
    mark: Mapping[str, Any]
    report: Mapping[str, Any]
    decoder: Mapping[str, Any]
    files: list[str]
    log_bytes: int
    turn_weights: list[float] = field(default_factory=list)


class Checkpoints:
    """Saves the position periodically.

    Args:
        writer: The store; a checkpoint makes everything written so far durable.
        log: The list of refused rows, which also becomes durable.
    """

    def __init__(self, writer: StoreWriter, log: IO[str] | None) -> None:
        self._writer = writer
        self._log = log
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether `EVERY` seconds have passed since the last checkpoint."""
        return time.monotonic() - self._last >= EVERY

    def log_bytes(self) -> int:
        """Make the list of refused rows durable and return its length."""
        if self._log is None:
            return 0
        self._log.flush()
        os.fsync(self._log.fileno())
        return os.fstat(self._log.fileno()).st_size

    def save(self, position: Position) -> None:
        """Make the position durable, and everything before it."""
        self._writer.checkpoint(json.dumps(asdict(position)))
        self._last = time.monotonic()


def is_saved(path: Path) -> bool:
    """Return whether an unfinished store with a checkpoint exists."""
    return any(path.parent.glob(f"{glob.escape(path.name)}*.partial/progress"))


def resumed(
    path: Path,
    identity_at: Callable[[Position], Mapping[str, Any]],
    log: Path | str | None,
    *,
    deduplicate: bool,
) -> tuple[StoreWriter, Position] | str:
    """Resume an unfinished store.

    Args:
        path: The path of the finished store.
        identity_at: Returns the inputs and settings of this run, to compare with the position's.
        log: The list of refused rows, which must not be shorter than at the checkpoint.
        deduplicate: The setting of the unfinished run.

    Returns:
        The writer and the position, or the reason to start from the beginning ("" if there is no
        unfinished store).
    """
    try:
        found = StoreWriter.resume(path, deduplicate=deduplicate)
    except ValueError as error:
        return f"{path}: starts from the beginning: {error}"
    if found is None:
        return ""
    writer, note = found
    position = Position(**json.loads(note))
    identity = identity_at(position)
    differing = [name for name in identity if identity[name] != position.identity.get(name)]
    if differing:
        changed = ", ".join(differing)
        return f"{path}: starts from the beginning, because the unfinished run had other {changed}"
    if log and not _holds(Path(log), position.log_bytes):
        reason = f"{log} no longer lists the rows refused before"
        return f"{path}: starts from the beginning, because {reason}"
    return writer, position


def _holds(log: Path, length: int) -> bool:
    return log.is_file() and log.stat().st_size >= length


def open_log(path: Path | str, position: Position | None) -> IO[str]:
    """Open the list of refused rows, truncated to its length at the position."""
    if position is None:
        return Path(path).open("w", encoding="utf-8")
    os.truncate(path, position.log_bytes)
    return Path(path).open("a", encoding="utf-8")


def losers(
    groups: NDArray[np.int64], votes: NDArray[np.uint32], *, by_majority: bool
) -> NDArray[np.int64]:
    """Return the groups to remove from contradictory pairs.

    Args:
        groups: int64 `[C, 2]`, numbers of groups that contradict each other.
        votes: uint32 `[C, 2]`, number of rows for each.
        by_majority: Whether to keep the one with more rows; otherwise both are removed.

    Returns:
        int64, sorted, without repetition.
    """
    if not by_majority:
        return np.unique(groups)
    return np.unique(groups[votes <= votes[:, ::-1]])


def settle(
    whole: Store, gone: NDArray[np.int64], report: DataReport, log: IO[str] | None = None
) -> NDArray[np.bool_]:
    """Remove contradicted groups from the counts: R308 for a row without another group.

    Args:
        whole: The store with all groups.
        gone: The groups to remove.
        report: The counts, in which these groups are still kept.
        log: The list of refused rows, if any.

    Returns:
        bool `[G]`, the groups that remain.

    Raises:
        BadDataError: No group remains.
    """
    files, lines = whole.sources()
    names = json.loads(whole.metadata)["files"]
    keep = np.ones(len(whole), bool)
    keep[gone] = False
    begins = np.concatenate(([True], (np.diff(lines) != 0) | (np.diff(files) != 0)))
    if report.kept == len(whole):
        begins[:] = True  # one group per row, even if rows share a line, as in a JSON array
    rows = np.cumsum(begins) - 1  # the groups of a row are adjacent
    is_left = np.bincount(rows, keep) > 0
    for group in gone.tolist():
        source = Source(names[files[group]], int(lines[group]))
        if is_left[rows[group]]:
            report.warn("W530", source, f" {CODES['R308']}")
        elif begins[group]:
            refusal = Refusal(source, "R308", CODES["R308"])
            report.withdraw(refusal)
            if log:
                write_refusal(log, refusal)
    prompts = int(whole.prompt_lengths()[gone].sum())
    report.prompt_tokens -= prompts
    report.completion_tokens -= int(whole.shared_lengths()[gone].sum()) - prompts
    sizes = np.diff(whole.completion_offsets())
    report.values = value_counts(whole.values()[np.repeat(keep, sizes)])
    report.check()
    if not keep.any():
        raise BadDataError(f"no row was kept\n{report.to_text()}")
    return keep


Progress = Callable[[int, int, int], None]
"""Called with the rows read, the bytes read and the total bytes (0: unknown)."""

Conflicts = Literal["keep", "drop_both", "majority"]


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """The settings of `build_store` that concern rows."""

    formats: FormatSettings
    max_bad_fraction: Annotated[float, Range(0, 1)]
    deduplicate: bool
    conflicts: Conflicts
    resume: bool

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that the store depends on, as JSON values."""
        values = {name: value for name, value in asdict(self).items() if name != "resume"}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain


def build_store(
    inputs: Inputs,
    tokenizer: PreferenceTokenizer,
    path: Path | str | None = None,
    *,
    formats: FormatSettings | None = None,
    max_bad_fraction: float = 0.0,
    deduplicate: bool = True,
    conflicts: Conflicts = "keep",
    resume: bool = False,
    progress: Progress | None = None,
    refused: Path | str | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[Store, DataReport]:
    """Read preference data into a store.

    Rows are streamed. Memory grows by about 40 bytes per row, which detect duplicates.

    Args:
        inputs: One input or several: files, folders, "-" for standard input, or tables in memory,
            in any known formats. Each input is one dataset of a mixture.
        tokenizer: The tokenizer, with its rules.
        path: Path of the store. None: in memory.
        formats: How to read rows. None: detect the format of each row.
        max_bad_fraction: Largest accepted fraction of broken rows (E codes).
        deduplicate: Whether to keep only one of several rows with the same tokens.
        conflicts: How to treat pairs that contradict each other (A over B, B over A): ``keep``
            all, ``drop_both``, or keep the ``majority`` (neither at a tie).
        resume: Whether to save the position every ten seconds, and continue from the position of
            an interrupted run. Requires a path.
        progress: Called after each batch.
        refused: Path of a JSON lines file for the file, line, code and reason of refused rows.
        tell: Called with a sentence when a run continues, or when it has to start over.

    Returns:
        The store, and the counts of all rows.

    Raises:
        BadDataError: Too many rows are broken, or none is left; no store is written.
        OSError: A file cannot be read, or the store cannot be written or would replace an input.
        ConfigError: The settings contradict each other.
        SettingTypeError: An argument or a setting has the wrong type.

    Example:
        >>> tokenizer = PreferenceTokenizer.load("model")
        >>> store, report = build_store("pairs.jsonl", tokenizer, "pairs.store")
        >>> print(report.to_text())
    """
    check_argument("tokenizer", PreferenceTokenizer, tokenizer)
    if resume and path is None:
        raise ConfigError("resume needs a path: a store in memory is lost with its process")
    settings = IngestSettings(
        formats or FormatSettings(), max_bad_fraction, deduplicate, conflicts, resume
    )
    readers = open_inputs(inputs, settings.formats.reading)
    _check_outputs(readers, path, refused)
    ingest = _Ingest(readers, tokenizer, None if path is None else Path(path), settings, progress)
    with ExitStack() as stack:
        return ingest.run(stack, refused, tell or (lambda sentence: None))


class _Ingest:
    def __init__(
        self,
        readers: Opened,
        tokenizer: PreferenceTokenizer,
        path: Path | None,
        settings: IngestSettings,
        progress: Progress | None,
    ) -> None:
        self._readers = readers
        self._tokenizer = tokenizer
        self._path = self._whole_path = path
        if path and settings.conflicts != "keep":
            self._whole_path = path.with_name(f"{path.name}.unsettled")
        self._settings = settings
        self._progress = progress
        sizes = [reader.size for reader in readers]
        self._size = sum(size or 0 for size in sizes) if None not in sizes else 0

    def run(
        self, stack: ExitStack, refused: Path | str | None, tell: Callable[[str], None]
    ) -> tuple[Store, DataReport]:
        self._log = None if refused is None else str(refused)
        writer, at = self._begin(tell)
        stack.callback(writer.close)  # a kept traceback would otherwise keep the lock
        log = stack.enter_context(open_log(refused, at)) if refused else None
        self._checkpoints = Checkpoints(writer, log)
        decoder = Decoder(self._settings.formats)
        ledger = Ledger(writer, self._settings.max_bad_fraction, log)
        intake = Intake(self._tokenizer, writer, decoder, ledger)
        if at:
            ledger.files = {name: number for number, name in enumerate(at.files)}
            ledger.report = DataReport.from_dict(at.report)
            decoder.restore(at.decoder)
            intake.turn_weights.values.extend(at.turn_weights)
        for number in range(at.input if at else 0, len(self._readers)):
            if at and number == at.input:
                self._readers[number].resume_from(dict(at.mark))
            self._read(number, intake)
        intake.report.date = self._tokenizer.rules.date
        intake.report.left_out = [path.as_posix() for path in self._readers.left_out]
        intake.close()
        store = self._seal(intake)
        self._advance(intake.report.read, self._size)
        return store, intake.report

    def _begin(self, tell: Callable[[str], None]) -> tuple[StoreWriter, Position | None]:
        deduplicate = self._settings.deduplicate
        if self._settings.resume and self._whole_path:
            found = resumed(self._whole_path, self._identity_at, self._log, deduplicate=deduplicate)
            if not isinstance(found, str):
                read = found[1].report["read"]
                tell(f"{self._path}: continues after the {read:,} rows that were already read")
                return found
            if found:
                tell(found)
        return StoreWriter(self._whole_path, deduplicate=deduplicate), None

    def _identity_at(self, begun: Position) -> dict[str, Any]:
        """Return the identity of this run, under the unfinished run's date if none was given."""
        given = self._tokenizer
        date = begun.identity["rules"].get("date")
        if date and given.reads_date and not given.has_given_date:
            self._tokenizer = PreferenceTokenizer(given.files, replace(given.rules, date=date))
        identity = self._identity()
        if identity != begun.identity:
            self._tokenizer = given
        return identity

    def _identity(self) -> dict[str, Any]:
        """Return the inputs and settings that must be equal to continue an unfinished run."""
        settings = {k: v for k, v in self._settings.to_dict().items() if k != "max_bad_fraction"}
        return {
            "inputs": [
                [reader.name, reader.size, _changed(reader.name)] for reader in self._readers
            ],
            "tokenizer": self._tokenizer.digest,
            "rules": self._tokenizer.rules.to_dict(),
            "settings": settings,
            "list of refused rows": self._log,
        }

    def _read(self, number: int, intake: Intake) -> None:
        """Read one container to its end."""
        reader = self._readers[number]
        take = _taker(intake, reader.columns())
        if take is None:
            for source, row in reader:
                if intake.take(source, row):
                    self._after_batch(number, intake)
        else:
            for first, batch in reader.batches():
                if isinstance(batch, Refusal):
                    intake.take(batch.source, batch)
                else:
                    take(batch, first, reader.name)
                self._after_batch(number, intake)
        intake.report.blank_lines += reader.blank_lines

    def _after_batch(self, number: int, intake: Intake) -> None:
        self._advance(intake.report.read, sum(reader.position for reader in self._readers))
        if not (self._settings.resume and self._checkpoints.is_due()):
            return
        reader = self._readers[number]
        self._checkpoints.save(
            Position(
                self._identity(),
                number,
                reader.mark(),
                intake.report.to_dict(),
                intake.decoder.state(),
                [*intake.ledger.files],
                self._checkpoints.log_bytes(),
                intake.turn_weights.values,
            )
        )

    def _advance(self, rows: int, position: int) -> None:
        if self._progress:
            self._progress(rows, position, self._size)

    def _seal(self, intake: Intake) -> Store:
        names = [reader.name for reader in self._readers]
        inputs = dict(zip(names, self._readers.inputs, strict=True))
        metadata = {
            "files": [*intake.ledger.files],
            "datasets": [inputs[name] for name in intake.ledger.files],
            "settings": self._settings.to_dict(),
            "rules": self._tokenizer.rules.to_dict(),
            "tokenizer": self._tokenizer.digest,
        }

        if intake.turn_weights.values:
            metadata[turn_weights.NAME] = intake.turn_weights.values

        def described() -> str:
            return json.dumps(metadata | {"report": intake.report.to_dict()})

        by = self._settings.conflicts
        if by == "keep":
            return intake.writer.finish(described())
        gone = losers(*intake.writer.conflicts(), by_majority=by == "majority")
        whole = intake.writer.finish(described())
        try:
            keep = settle(whole, gone, intake.report, intake.ledger.log)
            return whole.select(keep, self._path, described())
        finally:
            if self._whole_path:
                self._whole_path.unlink()


def _check_outputs(readers: Opened, path: Path | str | None, refused: Path | str | None) -> None:
    """Refuse to overwrite an input, or to write two outputs to one file."""
    outputs = [Path(output) for output in (path, refused) if output is not None]
    if len({output.absolute() for output in outputs}) < len(outputs):
        reason = "Cannot hold both the store and the list of refused rows"
        raise InputError(errno.EINVAL, reason, str(path))
    for output in filter(Path.exists, outputs):
        for reader in readers:
            if Path(reader.name).is_file() and output.samefile(reader.name):
                raise InputError(
                    errno.EINVAL, "Is data to read: write to another file", str(output)
                )


def _taker(
    intake: Intake, columns: tuple[str, ...] | None
) -> Callable[["pyarrow.RecordBatch", int, str], None] | None:
    """Return the method that reads a table's batches; None if rows are read one by one."""
    if columns is None:
        return None
    if set(NAMES) <= set(columns):
        return intake.take_ids
    return intake.take_texts if intake.reads_texts(columns) else None


def _changed(name: str) -> int | None:
    """Return a file's modification time in ns; None for other inputs."""
    path = Path(name)
    return path.stat().st_mtime_ns if path.is_file() else None
