"""Files to a store: read, check, tokenize in batches, write, and account for every row."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data.formats import KNOWN_SHAPES, decode_row
from logratio.data.groups import TokenizedGroup
from logratio.data.reading import JsonLines, Row
from logratio.data.records import InvalidRecordError, PreferenceRecord, Refusal, Source
from logratio.data.report import LISTED, BadDataError, DataReport, write_refusal
from logratio.data.tokenization import NO_TEMPLATE, PreferenceTokenizer

BATCH_ROWS = 256
BATCH_CHARACTERS = 1 << 20
"""Records are tokenized once so many, or so much text, have come together."""

Progress = Callable[[int, int, int], None]
"""Called with rows read, bytes read and bytes in all."""

_ALWAYS_STOPS = {"E105", "E106", "E108", "E401"}  # no fraction of the rows is bad: all are
_SHAPE_CODES = {"E201", "E203", "E206"}  # mended by knowing which shapes are read


def build_store(
    files: Sequence[Path | str],
    tokenizer: PreferenceTokenizer,
    path: Path | str | None = None,
    *,
    demonstrations: bool = False,
    max_bad_fraction: float = 0.0,
    progress: Progress | None = None,
    refused: Path | str | None = None,
) -> tuple[Store, DataReport]:
    """Read preference data into a store.

    Lines are streamed; memory grows by some 140 bytes a row, by which duplicates are
    known.

    Args:
        files: JSON lines, plain or gzip, of any known shape; shapes may be mixed.
        tokenizer: What turns text into ids.
        path: Where the store is to be; None: in memory.
        demonstrations: Make groups of one completion to imitate: prompt and completion,
            messages, or the chosen side of pairs.
        max_bad_fraction: Go on as long as no larger share of the rows is broken (E…).
        progress: Told after each batch how far it is.
        refused: Write every refused row's file, line, code and reason to this JSON lines file.

    Returns:
        The store, and what became of every row.

    Raises:
        BadDataError: Too many rows are broken, or none is left; nothing is written.
        OSError: A file cannot be read, or the store cannot be written.
    """
    readers = [JsonLines(Path(file)) for file in files]
    size = sum(reader.size for reader in readers)
    with _log(refused) as log:
        intake = _Intake(tokenizer, StoreWriter(path), log, demonstrations, max_bad_fraction)
        for reader in readers:
            for source, row in reader:
                if intake.take(source, row) and progress:
                    progress(intake.report.read, sum(r.position for r in readers), size)
            intake.report.blank_lines += reader.blank_lines
        store = intake.finish()
    if progress:
        progress(intake.report.read, size, size)
    return store, intake.report


def _log(path: Path | str | None) -> AbstractContextManager[IO[str] | None]:
    return nullcontext() if path is None else Path(path).open("w", encoding="utf-8")


class _Intake:
    """Rows on their way into a store.

    Attributes:
        report: What became of them.
    """

    def __init__(
        self,
        tokenizer: PreferenceTokenizer,
        writer: StoreWriter,
        log: IO[str] | None,
        demonstrations: bool,
        max_bad_fraction: float,
    ) -> None:
        self.report = DataReport()
        self._tokenizer = tokenizer
        self._writer = writer
        self._log = log
        self._demonstrations = demonstrations
        self._max_bad_fraction = max_bad_fraction
        self._errors: list[str] = []
        self._waiting: list[tuple[bytes, PreferenceRecord]] = []
        self._characters = 0
        self._files: dict[str, int] = {}
        self._seen: dict[bytes, int] = {}  # content to place, see _place

    def take(self, source: Source, row: Row | Refusal) -> bool:
        """Take one row; say whether a batch went through with it."""
        self.report.read += source.line > 0  # else it is no row, but something about the file
        self._files.setdefault(source.file, len(self._files))
        if isinstance(row, Refusal):
            self._refuse(row)
            return False
        try:
            decoded = decode_row(row, source, demonstrations=self._demonstrations)
        except InvalidRecordError as error:
            self._refuse(Refusal(source, error.code, error.reason), row)
            return False
        self.report.formats[decoded.format] += 1
        self.report.extra_keys.update(decoded.extra_keys)
        return self._wait(decoded.record)

    def finish(self) -> Store:
        """Take what is waiting, check the account, seal the store."""
        self._flush()
        report = self.report
        if report.broken > self._max_bad_fraction * report.read:
            raise self._broken()
        report.check()
        if not report.kept:
            raise BadDataError(f"no row was kept\n{report.to_text()}")
        metadata = {
            "files": list(self._files),
            "demonstrations": self._demonstrations,
            "rules": self._tokenizer.rules.to_dict(),
            "tokenizer": self._tokenizer.digest,
            "report": report.to_dict(),
        }
        return self._writer.finish(json.dumps(metadata))

    def _wait(self, record: PreferenceRecord) -> bool:
        """Let a record wait for its batch."""
        if record.is_chat and self._tokenizer.chat_template is None:
            self._refuse(Refusal(record.source, "E401", NO_TEMPLATE))
        if self._errors and not self._max_bad_fraction:
            return False  # the run is lost: read on to find further faults, and no more
        digest = record.digest()
        if digest in self._seen:
            self.report.drop_duplicate(record.source, self._source(self._seen[digest]))
            return False
        self._waiting.append((digest, record))
        self._characters += sum(map(len, record.texts()))
        is_full = len(self._waiting) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS
        if is_full:
            self._flush()
        return is_full

    def _flush(self) -> None:
        """Tokenize and write what is waiting."""
        waiting, self._waiting, self._characters = self._waiting, [], 0
        groups = self._tokenizer.encode_records([record for _, record in waiting])
        for (digest, record), group in zip(waiting, groups, strict=True):
            if isinstance(group, Refusal):
                self._refuse(group)
            elif digest in self._seen:
                self.report.drop_duplicate(record.source, self._source(self._seen[digest]))
            else:
                self._keep(digest, record, group)

    def _keep(self, digest: bytes, record: PreferenceRecord, group: TokenizedGroup) -> None:
        file, line = self._files[record.source.file], record.source.line
        self._seen[digest] = file << 40 | line
        other = self._seen.get(record.digest(swapped=True))
        if len(record.completions) == 2 and other is not None:
            self.report.warn("W507", record.source, f" against {self._source(other)}")
        push(self._writer, group, file)
        self.report.keep(group)

    def _source(self, place: int) -> Source:
        return Source(list(self._files)[place >> 40], place & (1 << 40) - 1)

    def _refuse(self, refusal: Refusal, row: object = None) -> None:
        self.report.refuse(refusal)
        if self._log:
            write_refusal(self._log, refusal, row)
        if not refusal.stops:
            return
        if len(self._errors) < LISTED:
            self._errors.append(str(refusal))
        is_lost = not self._max_bad_fraction and len(self._errors) == LISTED
        if is_lost or refusal.code in _ALWAYS_STOPS:
            raise self._broken()

    def _broken(self) -> BadDataError:
        report = self.report
        summary = f"the data is broken: {report.broken:,} of the {report.read:,} rows read"
        if not _SHAPE_CODES.isdisjoint(report.refused_by_code):
            summary += f"\n{KNOWN_SHAPES}"
        return BadDataError(summary, tuple(self._errors))


def push(writer: StoreWriter, group: TokenizedGroup, file: int) -> None:
    """Write a group; ``file`` is its file's number."""
    completions = group.completions
    writer.push(
        np.array(group.prompt_ids, np.int32),
        np.fromiter(chain.from_iterable(c.ids for c in completions), np.int32),
        np.fromiter(chain.from_iterable(c.mask for c in completions), np.uint8),
        np.array([len(c.ids) for c in completions], np.uint32),
        np.array([ROLES.index(c.role) for c in completions], np.uint8),
        file,
        group.source.line,
    )
