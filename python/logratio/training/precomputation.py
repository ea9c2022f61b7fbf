"""Compute the reference's log-probs once, into a cache that any number of runs can read."""

import os
import re
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from logratio._rust import CacheFolder
from logratio.cache.identity import record_tolerance
from logratio.data.analysis.token_use import BatchSharing
from logratio.data.readers.inputs import Inputs, as_inputs, names_stdin
from logratio.errors import ConfigError, LogratioError
from logratio.extras import require
from logratio.forecast import Forecast, check_writable, count, duration, size
from logratio.one_process import launched
from logratio.progress import progress, say
from logratio.training import memory, run_folder, torch_settings
from logratio.training.checkpoint import RunInterruptedError, interrupts
from logratio.training.config import PrecomputeConfig, TrainConfig, with_local_models
from logratio.training.dataset import Dataset, answers_of, load_dataset, mismatched
from logratio.training.fingerprint import model_fingerprint, reference_fingerprint
from logratio.training.memory import token_budget
from logratio.training.methods.data_checks import check_groups
from logratio.training.models import (
    base_folder,
    check_model_folder,
    check_quantization,
    default_device,
    precision_note,
    precision_of,
)
from logratio.training.parallel.processes import Processes
from logratio.training.reference import holds_sums_only
from logratio.training.reference_scorer import (
    ReferenceScorer,
    Work,
    entries_of,
    first_rows,
    missing_rows,
    owners,
    write_fingerprint,
)
from logratio.training.stall_guard import StallGuard
from logratio.training.torch_settings import ask_for_expandable_segments, exact_products
from logratio.validation import check_kind


class ShareError(LogratioError, ValueError):
    """The share is malformed."""


@dataclass(frozen=True)
class Share:
    """One of `count` parts of the groups, of about equal size, split by content hash.

    Attributes:
        index: Index of this part, from 0.
        count: Number of parts.
        rank: Rank of this process among those of its launcher; rank 0 draws the progress bar.
        processes: Number of processes that the launcher started.
    """

    index: int = 0
    count: int = 1
    rank: int = 0
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Return which groups belong to this share, by the key of their first completion.

        Args:
            keys: Keys of the first completions, uint8 `[G, 32]`.

        Returns:
            Whether each group is in the share, bool `[G]`.
        """
        # A key is a hash, so its first 64 bits are uniformly distributed.
        heads = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
        held: np.ndarray = heads % np.uint64(self.count) == self.index
        return held


def share_of(given: str | None, environment: Mapping[str, str] = os.environ) -> Share:
    """Return this process's share: `given` ("2/4"), divided further among torchrun's processes.

    torchrun sets RANK and WORLD_SIZE. No process group is created: the processes share only the
    cache folder.

    Args:
        given: Share in the form I/N with I from 1 to N; None: everything.
        environment: Environment variables.

    Raises:
        ShareError: `given` is not of that form.
    """
    index, count = _parse(given) if given else (0, 1)
    rank, processes = launched(environment)
    return Share(index * processes + rank, count * processes, rank, processes)


def _parse(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise ShareError(f"--share must be one of 1/N to N/N, for example 2/4, not {given!r}")
    return index - 1, count


def pass_of_run(
    config: TrainConfig,
    dataset: Dataset,
    data: Inputs,
    show_progress: bool,
    processes: Processes,
) -> "Precompute":
    """Return the pass that fills the cache of a training run.

    Args:
        config: Settings of the run, with a cache.
        dataset: The tokenized data.
        data: What it was read from.
        show_progress: Draw a progress bar.
        processes: The processes of the run, which share the pass.
    """
    wanted = PrecomputeConfig(
        config.reference or config.model,
        data,
        str(config.cache),
        sums_only=holds_sums_only(str(config.cache), reference_fingerprint(config)),
        share_beginnings=config.share_beginnings,
        read_mode=config.read_mode,
        stall_timeout=config.stall_timeout,
        precision=precision_of(config),
        quantization=config.quantization,
        device=config.device,
        rules=config.rules,
        formats=config.formats,
        max_bad_fraction=config.max_bad_fraction,
    )
    rank, count = processes.rank, processes.count
    return Precompute(wanted, dataset, Share(rank, count, rank, count), show_progress)


RESUME = "completed scores are in the cache; run again to continue"


@dataclass(frozen=True)
class PrecomputeResult:
    """The result of a precompute pass.

    `new`, `hits`, `duplicates` and `others` add up to the number of completions in the data.

    Attributes:
        folder: Folder of this reference's log-probs.
        new: Completions scored by this pass.
        hits: Completions that were already in the cache.
        duplicates: Completions that equal an earlier one of the data, token for token.
        others: Missing completions that belong to other processes' shares.
        tokens: Number of log-probs computed.
        nbytes: Bytes written to the cache.
        seconds: Duration, without reading the data.
        share: Part of the data that was scored, for example "2/4".
    """

    folder: Path
    new: int
    hits: int
    duplicates: int = 0
    others: int = 0
    tokens: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    share: str = "1/1"

    def __repr__(self) -> str:
        return (
            f"PrecomputeResult({self.new:,} new, {count(self.hits, 'hit')}, "
            f"{count(self.tokens, 'token')}, {str(self.folder)!r})"
        )

    def to_text(self) -> str:
        """Return a one-line summary for the terminal."""
        left = f", {self.others:,} left to other shares" if self.share != "1/1" else ""
        return (
            f"{count(self.new, 'completion')} scored ({count(self.tokens, 'token')}, "
            f"{self.tokens / max(self.seconds, 1e-9):,.0f}/s), {self.hits:,} already in the cache, "
            f"{count(self.duplicates, 'duplicate')}{left}; {size(self.nbytes)} written in "
            f"{duration(self.seconds)}: {self.folder}"
        )


def precompute(config: PrecomputeConfig, *, show_progress: bool = True) -> PrecomputeResult:
    """Score every completion in the data that the cache lacks, and store its log-probs.

    Each block is durable before the next one is started, so a pass that was killed continues where
    it stopped. Under torchrun, each process scores its share, on any number of hosts.

    Args:
        config: Settings of the pass.
        show_progress: Draw progress bars and print notes.

    Raises:
        ModelFolderError, OutputError, BadDataError, ConfigError: A folder, data row or setting is
            invalid; raised before the model is loaded.
        RunInterruptedError: Ctrl-C or SIGTERM was received; completed scores are in the cache.
        MemoryShortageError: A single group does not fit; completed scores are in the cache.
        OSError: The disk is full; completed blocks are in the cache.

    Example:
        >>> precompute(PrecomputeConfig("sft-model", "pairs.jsonl", "cache")).new
        20000
    """
    ready = prepare(config, show_progress=show_progress)
    if show_progress:
        say(precision_note(config))
    return ready.run()


def prepare(config: PrecomputeConfig, *, show_progress: bool = True) -> "Precompute":
    """Check the settings and folders, and tokenize the data, without loading the model."""
    check_kind(config, PrecomputeConfig)
    share = share_of(config.share)
    if config.engine == "local":
        ask_for_expandable_segments(config.device)
    check_settings(config, share)
    config = with_local_models(config)
    check_folders(config)
    show_progress = show_progress and share.rank == 0
    dataset = load_dataset(
        config.model,
        config.data,
        config.rules,
        config.formats,
        max_bad_fraction=config.max_bad_fraction,
        show_progress=show_progress,
        recorded_date=lambda: _date_of_cache(config),
    )
    if config.mismatched:
        dataset = answers_of(dataset, show_progress=show_progress)
        check_groups(dataset.store, "labelled answers", "--mismatched")
        dataset = mismatched(dataset)
    return Precompute(config, dataset, share, show_progress)


def _date_of_cache(config: PrecomputeConfig) -> str | None:
    fingerprint = model_fingerprint(config.model, precision_of(config), config.quantization)
    return run_folder.date_of_cache(entries_of(config.sums_only).folder(config.cache, fingerprint))


def check_settings(config: PrecomputeConfig, share: Share) -> None:
    """Check the settings of a pass that can be checked without its model.

    Raises:
        ConfigError: A setting is invalid; the message names it.
        DeviceError, MissingExtraError: The device or an optional dependency is not usable.
    """
    if any(number is not None and number < 1 for number in (config.token_budget, config.workers)):
        raise ConfigError("--token-budget and --workers must be at least 1")
    if config.workers is not None and config.engine != "ray":
        raise ConfigError("--workers are Ray actors: give --engine ray, or use torchrun instead")
    if config.engine == "ray" and share.processes > 1:
        raise ConfigError("--engine ray runs from one process: start it without torchrun")
    if share.processes > 1 and any(map(names_stdin, as_inputs(config.data))):
        raise ConfigError(
            "only one process can read standard input: give files, or a store of `data build`"
        )
    if config.engine == "ray" and config.stall_timeout is not None:
        raise ConfigError("--stall-timeout watches this process, and --engine ray uses others")
    if config.engine == "local":
        default_device(config.device)  # Ray workers may have devices that this machine lacks
    if config.engine == "ray":
        require("ray.data", "ray")


def check_folders(config: PrecomputeConfig) -> None:
    """Check the folders of a pass.

    Raises:
        ModelFolderError, QuantizationError, OutputError, MissingExtraError: The model, its
            quantization, or the cache folder is not usable.
    """
    check_model_folder(Path(config.model))
    check_quantization(base_folder(config.model), config.quantization)
    check_writable(Path(config.cache))


class Precompute:
    """A prepared pass: `run` performs it, `forecast` estimates its cost.

    Attributes:
        share: Part of the groups that this process scores.
    """

    def __init__(
        self, config: PrecomputeConfig, dataset: Dataset, share: Share, show_progress: bool
    ) -> None:
        self.config, self.dataset, self.share = config, dataset, share
        self.store, self.show_progress = dataset.store, show_progress
        self.precision = precision_of(config)
        self.fingerprint = model_fingerprint(config.model, self.precision, config.quantization)
        self.entries = entries_of(config.sums_only)
        self.folder = self.entries.folder(config.cache, self.fingerprint)

    @cached_property
    def keys(self) -> np.ndarray:
        """Key of each completion, uint8 `[N, 32]`."""
        return self.entries.keys(self.store)

    @cached_property
    def different(self) -> np.ndarray:
        """First row of each distinct completion, int64."""
        return first_rows(self.keys)

    @cached_property
    def missing(self) -> np.ndarray:
        """Rows of the completions that the cache lacks, of all shares, int64."""
        return missing_rows(
            self.entries,
            self.keys,
            self.different,
            self.folder,
            self.fingerprint,
            pread=self.config.read_mode == "pread",
        )

    @cached_property
    def work(self) -> Work:
        """The missing completions in this process's share of the groups."""
        first = self.store.completion_offsets()[owners(self.store, self.missing)]
        rows = self.missing[self.share.holds(self.keys[first])]
        return Work(self.store, self.keys, rows, self.folder, self.fingerprint)

    @cached_property
    def forecast(self) -> Forecast:
        """Memory, disk space and time of the pass."""
        config, work = self.config, self.work
        device = config.device if config.engine == "local" else "cpu"
        at_once = token_budget(config.token_budget, config.model, default_device(device))
        read, shared = float(self.store.shared_lengths()[work.groups].sum()), ""
        if config.share_beginnings and len(work.groups):
            sharing = BatchSharing.of_pass(self.store, work.groups, at_once.tokens)
            read, shared = float(sharing.together), f", {sharing.to_text()}, if the model can"
        part = "" if self.share.count == 1 else f"share {self.share}: "
        return Forecast(
            memory_bytes=memory.scoring_bytes(
                [config.model],
                min(at_once.tokens, int(read)),
                config.quantization,
                self.precision,
            ),
            disk_bytes=self.entries.nbytes(len(work.rows), work.tokens),
            disk_path=Path(config.cache),
            seconds=memory.seconds(config.model, read, memory.FORWARD, device, self.precision),
            notes=f"{part}{len(work.rows):,} completions to score, {work.tokens:,} tokens, "
            f"{precision_note(config)}{shared}",
        )

    def run(self) -> PrecomputeResult:
        """Score the missing completions; load no model if there are none."""
        started = time.monotonic()
        work = self.work
        written = self._score() if len(work.rows) else 0
        return PrecomputeResult(
            self.folder,
            new=len(work.rows),
            hits=len(self.different) - len(self.missing),
            duplicates=self.store.completions - len(self.different),
            others=len(self.missing) - len(work.rows),
            tokens=work.tokens,
            nbytes=written,
            seconds=time.monotonic() - started,
            share=str(self.share),
        )

    def _score(self) -> int:
        """Score the missing completions, and return the number of bytes written."""
        check_writable(self.folder, self.forecast.disk_bytes)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_fingerprint(self.folder, self.fingerprint)
        run_folder.record_date(self.folder, run_folder.date_of_store(self.store))
        written = 0
        guard = self._guard()
        with (
            exact_products(),
            guard.watching(),
            interrupts() as interrupted,
            progress("scoring", self.work.tokens, "tokens", show=self.show_progress) as advance,
            closing(self._batches()) as batches,
        ):
            for tokens, nbytes in batches:
                # After the last tokens the scores are sealed, which takes long for a large cache.
                guard.enter("during the precompute pass", patient=not tokens)
                advance(tokens)
                written += nbytes
                if signal := interrupted():
                    raise RunInterruptedError(signal, RESUME)
        self._seal_idle_journals()
        return written

    def _guard(self) -> StallGuard:
        """Return what ends the pass if it is stuck, at the time when the model is loaded."""
        is_here = self.config.engine == "local"
        device = default_device(self.config.device if is_here else "cpu")
        guard = StallGuard.of(self.config.stall_timeout, device)
        guard.enter("before the first scores of the precompute pass", patient=True)
        return guard

    def _seal_idle_journals(self) -> None:
        """Seal journals whose writers have exited: killed processes, or Ray actors."""
        CacheFolder(
            self.folder,
            self.fingerprint.digest,
            sums=self.config.sums_only,
            tolerance=record_tolerance(self.fingerprint.hard),
        ).seal_idle()

    def _batches(self) -> Generator[tuple[int, int], None, None]:
        """Score; yield (tokens scored, bytes written) increments; all is durable at the end."""
        if self.config.engine == "ray":
            from logratio.training.precomputation_ray import score_on_ray

            return score_on_ray(self.config, self.work)
        return self._batches_here()

    def _batches_here(self) -> Generator[tuple[int, int], None, None]:
        device = default_device(self.config.device)
        if slow := torch_settings.advice(device):
            say(slow)
        with closing(ReferenceScorer(self.config, self.work, device)) as scorer:
            try:
                for tokens in scorer.score(self.work.groups):
                    yield tokens, 0
            finally:
                scorer.flush()
            yield 0, scorer.nbytes
            scorer.seal()
