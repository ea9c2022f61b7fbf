"""Inputs to a store: read, checked, encoded, written; every row accounted for; resumable."""

import errno
import glob
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, StoreWriter
from logratio.data.formats.decoder import Decoder
from logratio.data.formats.settings import FormatSettings
from logratio.data.readers.inputs import Inputs, Opened, open_inputs
from logratio.data.records import CODES, Refusal, Source
from logratio.data.store.id_columns import NAMES
from logratio.data.store.ingest import Intake
from logratio.data.store.row_report import BadDataError, DataReport, Ledger, write_refusal
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError, InputError
from logratio.validation import check_fields

if TYPE_CHECKING:
    import pyarrow

EVERY = 10.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True, slots=True)
class Position:
    """All that is needed to go on.

    Attributes:
        identity: What must be equal for the rest to be the rest of the same store.
        input: Number of the container that is being read.
        mark: Where in it, as `Rows.mark` said.
        report: The account so far, as `DataReport.to_dict` gave it.
        decoder: What the rows of each file were, as `Decoder.state` said.
        files: Names of the containers in the order of their numbers.
        log_bytes: Length of the list of refused rows.
    """

    identity: Mapping[str, Any]
    input: int
    mark: Mapping[str, Any]
    report: Mapping[str, Any]
    decoder: Mapping[str, Any]
    files: list[str]
    log_bytes: int


class Checkpoints:
    """Saves a position from time to time.

    Args:
        writer: What has been written so far becomes durable with each.
        log: The list of refused rows, which becomes durable too.
    """

    def __init__(self, writer: StoreWriter, log: IO[str] | None) -> None:
        self._writer = writer
        self._log = log
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Say whether it is time."""
        return time.monotonic() - self._last >= EVERY

    def log_bytes(self) -> int:
        """Make the list of refused rows durable; return its length."""
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
    """Say whether an unfinished store, settled or not, can be taken up again."""
    return any(path.parent.glob(f"{glob.escape(path.name)}*.partial/progress"))


def resumed(
    path: Path,
    identity_at: Callable[[Position], Mapping[str, Any]],
    log: Path | str | None,
    *,
    deduplicate: bool,
) -> tuple[StoreWriter, Position] | str:
    """Take up an unfinished store.

    Args:
        path: Where it is to be.
        identity_at: Returns what must be equal for the rest to be the rest of it.
        log: Its list of refused rows, which must hold what it held then.
        deduplicate: As the writer was told before.

    Returns:
        Its writer and position, or why it begins anew.
    """
    try:
        found = StoreWriter.resume(path, deduplicate=deduplicate)
    except ValueError as error:
        return f"{path}: begins anew: {error}"
    if found is None:
        return ""
    writer, note = found
    position = Position(**json.loads(note))
    identity = identity_at(position)
    differing = [name for name in identity if identity[name] != position.identity.get(name)]
    if differing:
        return f"{path}: begins anew, since what was read before had other {', '.join(differing)}"
    if log and not _holds(Path(log), position.log_bytes):
        return f"{path}: begins anew, since {log} no longer lists the rows refused before"
    return writer, position


def _holds(log: Path, length: int) -> bool:
    return log.is_file() and log.stat().st_size >= length


def open_log(path: Path | str, position: Position | None) -> IO[str]:
    """Open the list of refused rows, cut to where the position found it."""
    if position is None:
        return Path(path).open("w", encoding="utf-8")
    os.truncate(path, position.log_bytes)
    return Path(path).open("a", encoding="utf-8")


def losers(
    groups: NDArray[np.int64], votes: NDArray[np.uint32], *, by_majority: bool
) -> NDArray[np.int64]:
    """Say which groups go.

    Args:
        groups: `[C, 2]`, numbers of groups that contradict each other.
        votes: `[C, 2]`, how often each was said.
        by_majority: Keep what was said more often; else both go.

    Returns:
        int64, sorted, each once.
    """
    if not by_majority:
        return np.unique(groups)
    return np.unique(groups[votes <= votes[:, ::-1]])


def settle(
    whole: Store, gone: NDArray[np.int64], report: DataReport, log: IO[str] | None = None
) -> NDArray[np.bool_]:
    """Take losing groups out of the account: R308 where nothing of their row is left.

    Args:
        whole: Every group.
        gone: Those that go.
        report: The account, with their tokens and rows counted as kept.
        log: Where refused rows are listed, if anywhere.

    Returns:
        bool `[G]`, the groups that stay.

    Raises:
        BadDataError: No group stays.
    """
    files, lines = whole.sources()
    names = json.loads(whole.metadata)["files"]
    keep = np.ones(len(whole), bool)
    keep[gone] = False
    begins = np.concatenate(([True], (np.diff(lines) != 0) | (np.diff(files) != 0)))
    if report.kept == len(whole):
        begins[:] = True  # a group a row, even where rows share a line, as in a JSON array
    rows = np.cumsum(begins) - 1  # the groups of a row stand together
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
    report.check()
    if not keep.any():
        raise BadDataError(f"no row was kept\n{report.to_text()}")
    return keep


Progress = Callable[[int, int, int], None]
"""Called with rows read, bytes read and bytes in all (0: unknown)."""

Conflicts = Literal["keep", "drop_both", "majority"]


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """What becomes of rows; see `build_store`."""

    formats: FormatSettings
    max_bad_fraction: float
    deduplicate: bool
    conflicts: Conflicts
    resume: bool

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """Return what the store depends on, as JSON values."""
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

    Rows are streamed; memory grows by some 40 bytes a row, by which duplicates are known.

    Args:
        inputs: One, or several: files, folders, "-" for standard input, or tables in memory, of any
            known shape; shapes may be mixed. Each input is one dataset of a mixture.
        tokenizer: What turns text into ids.
        path: Where the store is to be; None: in memory.
        formats: How rows are read; None: every format, detected.
        max_bad_fraction: Go on as long as no larger share of the rows is broken (E…).
        deduplicate: Keep one of several rows that are the same tokens.
        conflicts: Of pairs that say the opposite of each other (A over B, B over A): ``keep`` all,
            ``drop_both``, or keep what the ``majority`` says (none at a tie).
        resume: Save the position every ten seconds, and go on from it if the last run was cut
            off. Needs a path.
        progress: Told after each batch how far it is.
        refused: Write every refused row's file, line, code and reason to this JSON lines file.
        tell: Told in a sentence where the reading goes on, or why it begins anew.

    Returns:
        The store, and what became of every row.

    Raises:
        BadDataError: Too many rows are broken, or none is left; nothing is written.
        OSError: A file cannot be read, or the store cannot be written, or would be over the data.
        ConfigError: The settings contradict each other.
        SettingTypeError: A setting has the wrong type.
    """
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
        stack.callback(writer.close)  # else a traceback that someone keeps would keep the lock
        log = stack.enter_context(open_log(refused, at)) if refused else None
        self._checkpoints = Checkpoints(writer, log)
        decoder = Decoder(self._settings.formats)
        ledger = Ledger(writer, self._settings.max_bad_fraction, log)
        intake = Intake(self._tokenizer, writer, decoder, ledger)
        if at:
            ledger.files = {name: number for number, name in enumerate(at.files)}
            ledger.report = DataReport.from_dict(at.report)
            decoder.restore(at.decoder)
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
                tell(f"{self._path}: goes on after {read:,} rows that were read before")
                return found
            if found:
                tell(found)
        return StoreWriter(self._whole_path, deduplicate=deduplicate), None

    def _identity_at(self, begun: Position) -> dict[str, Any]:
        """Say what must equal that of a run begun earlier, under the date that its template had."""
        given = self._tokenizer
        date = begun.identity["rules"].get("date")
        if date and given.reads_date and not given.has_given_date:
            self._tokenizer = PreferenceTokenizer(given.files, replace(given.rules, date=date))
        identity = self._identity()
        if identity != begun.identity:
            self._tokenizer = given
        return identity

    def _identity(self) -> dict[str, Any]:
        """Say what must be equal for a run to be the rest of an earlier one."""
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
    """Refuse to write over the data, or two things to one file."""
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
    """Find what takes a table's batches; None where rows are taken one by one."""
    if columns is None:
        return None
    if set(NAMES) <= set(columns):
        return intake.take_ids
    return intake.take_texts if intake.reads_texts(columns) else None


def _changed(name: str) -> int | None:
    """Tell when a file changed last; None for what is no file."""
    path = Path(name)
    return path.stat().st_mtime_ns if path.is_file() else None
