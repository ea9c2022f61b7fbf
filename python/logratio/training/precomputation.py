"""The reference's log-probs, once, into a cache that any number of runs can read."""

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
from logratio.errors import ConfigError, LogratioError
from logratio.extras import require
from logratio.forecast import Forecast, check_writable, duration, size
from logratio.progress import progress, say
from logratio.training import memory, run_folder, torch_settings
from logratio.training.checkpoint import RunInterruptedError, interrupts
from logratio.training.config import PrecomputeConfig
from logratio.training.dataset import Dataset, load_dataset
from logratio.training.fingerprint import model_fingerprint
from logratio.training.memory import token_budget
from logratio.training.models import (
    base_folder,
    check_model_folder,
    check_quantization,
    default_device,
    precision_note,
    precision_of,
)
from logratio.training.reference_scorer import (
    ReferenceScorer,
    Work,
    entries_of,
    first_rows,
    missing_rows,
    owners,
    write_fingerprint,
)
from logratio.training.torch_settings import ask_for_expandable_segments, exact_products
from logratio.validation import check_kind


class ShareError(LogratioError, ValueError):
    """The share is not one of any division."""


@dataclass(frozen=True)
class Share:
    """One of `count` parts of the groups, of about the same number each.

    Attributes:
        index: from 0.
        count: parts in all.
        rank: this process among those that one launcher started; 0 draws the progress.
        beside: processes that the launcher started.
    """

    index: int = 0
    count: int = 1
    rank: int = 0
    beside: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """Tell which groups are in this share, by the key of each one's first completion.

        Args:
            keys: uint8 `[G, 32]`.

        Returns:
            bool `[G]`.
        """
        # A key is a hash already: its first 64 bits are spread evenly.
        heads = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
        held: np.ndarray = heads % np.uint64(self.count) == self.index
        return held


def share_of(given: str | None, environment: Mapping[str, str] = os.environ) -> Share:
    """Return the share that `given` names ("2/4"), divided among the processes of torchrun.

    torchrun says in RANK and WORLD_SIZE which of its processes this is. No process group is made:
    the processes share nothing but the folder.

    Raises:
        ShareError: `given` is not of the form I/N with I from 1 to N.
    """
    index, count = _parse(given) if given else (0, 1)
    rank, beside = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if "RANK" not in environment or not 0 <= rank < beside:
        rank, beside = 0, 1
    return Share(index * beside + rank, count * beside, rank, beside)


def refuse_several(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to do the same work in each process of a launcher, over the same output.

    Raises:
        ShareError: torchrun started more than one process.
    """
    count = share_of(None, environment).beside
    if count > 1:
        raise ShareError(
            f"{command} runs in one process, and torchrun started {count} (WORLD_SIZE): each would "
            f"do the whole work. Start it without torchrun; `logratio precompute` is the command "
            "that divides its work among processes"
        )


def _parse(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise ShareError(f"share must be one of 1/N to N/N, as 2/4, not {given!r}")
    return index - 1, count


RESUME = "what was scored is in the cache; run again to go on"


@dataclass(frozen=True)
class PrecomputeResult:
    """What a pass did. New, hits, duplicates and others add up to the data's completions.

    Attributes:
        folder: where this reference's log-probs lie.
        new: completions scored now.
        hits: completions that were in the cache.
        duplicates: completions that repeat another one of the data, token for token.
        others: completions that are missing and belong to other processes' shares.
        tokens: log-probs computed for the new ones.
        nbytes: written to the cache.
        seconds: it took, without reading the data.
        share: which part of the data this was, as "2/4".
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
            f"PrecomputeResult({self.new:,} new, {self.hits:,} hits, {self.tokens:,} tokens, "
            f"{str(self.folder)!r})"
        )

    def to_text(self) -> str:
        """Return one line for the terminal."""
        left = f", {self.others:,} left to other shares" if self.share != "1/1" else ""
        return (
            f"{self.new:,} completions scored ({self.tokens:,} tokens, "
            f"{self.tokens / max(self.seconds, 1e-9):,.0f}/s), {self.hits:,} were in the cache, "
            f"{self.duplicates:,} repeated{left}; {size(self.nbytes)} written in "
            f"{duration(self.seconds)}: {self.folder}"
        )


def precompute(config: PrecomputeConfig, *, show_progress: bool = True) -> PrecomputeResult:
    """Fill the cache with the log-probs of every completion in the data that it lacks.

    Every block is durable before the next is begun: a pass that was killed goes on where it was.
    Under torchrun, each process scores its share; they may stand on any number of hosts.

    Raises:
        ModelFolderError, OutputError, BadDataError, ConfigError: before anything long.
        RunInterruptedError: after Ctrl-C or SIGTERM; what was scored is in the cache.
        MemoryShortageError: a group does not fit; what was scored is in the cache.
        OSError: the disk is full; what was acknowledged is in the cache.
    """
    ready = prepare(config, show_progress=show_progress)
    if show_progress:
        say(precision_note(config))
    return ready.run()


def prepare(config: PrecomputeConfig, *, show_progress: bool = True) -> "Precompute":
    """Check the folders and tokenize the data; nothing long has started."""
    check_kind(config, PrecomputeConfig)
    share = share_of(config.share)
    if config.engine == "local":
        ask_for_expandable_segments(config.device)
    check_config(config, share)
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
    return Precompute(config, dataset, share, show_progress)


def _date_of_cache(config: PrecomputeConfig) -> str | None:
    fingerprint = model_fingerprint(config.model, precision_of(config), config.quantization)
    return run_folder.date_of_cache(entries_of(config.sums_only).folder(config.cache, fingerprint))


def check_config(config: PrecomputeConfig, share: Share) -> None:
    """Refuse settings that cannot work.

    Raises:
        ConfigError: with the setting's name.
        DeviceError, ModelFolderError, QuantizationError, OutputError, MissingExtraError: as named.
    """
    if any(number is not None and number < 1 for number in (config.token_budget, config.workers)):
        raise ConfigError("token_budget and workers must be at least 1")
    if config.workers is not None and config.engine != "ray":
        raise ConfigError("workers are actors of Ray: give --engine ray, or start torchrun")
    if config.engine == "ray" and share.beside > 1:
        raise ConfigError("one process starts the engine ray: run it without torchrun")
    if "-" in config.data and share.beside > 1:
        raise ConfigError(
            "standard input reaches one process only: name files, or a store of `data build`"
        )
    if config.engine == "local":
        default_device(config.device)  # Ray's workers may have other devices than this machine
    check_model_folder(Path(config.model))
    check_quantization(base_folder(config.model), config.quantization)
    check_writable(Path(config.cache))
    if config.engine == "ray":
        require("ray.data", "ray")


class Precompute:
    """A pass that is ready to start.

    Attributes:
        share: the part of the groups that this process scores.
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
        """What names each completion, uint8 `[N, 32]`."""
        return self.entries.keys(self.store)

    @cached_property
    def different(self) -> np.ndarray:
        """The first row of each different completion, int64."""
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
        """What this process has to score: the missing completions of its share's groups."""
        first = self.store.completion_offsets()[owners(self.store, self.missing)]
        rows = self.missing[self.share.holds(self.keys[first])]
        return Work(self.store, self.keys, rows, self.folder, self.fingerprint)

    @cached_property
    def forecast(self) -> Forecast:
        """What the pass will need."""
        config, work = self.config, self.work
        device = config.device if config.engine == "local" else "cpu"
        read = float(self.store.shared_lengths()[work.groups].sum())
        at_once = token_budget(config.token_budget, config.model, default_device(device))
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
            f"{precision_note(config)}",
        )

    def run(self) -> PrecomputeResult:
        """Score what is missing; a pass with nothing to score loads no model."""
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
        """Score what is missing, and return how many bytes were written."""
        check_writable(self.folder, self.forecast.disk_bytes)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_fingerprint(self.folder, self.fingerprint)
        run_folder.record_date(self.folder, run_folder.date_of_store(self.store))
        written = 0
        with (
            exact_products(),
            interrupts() as interrupted,
            progress("scoring", self.work.tokens, "tokens", show=self.show_progress) as advance,
            closing(self._batches()) as batches,
        ):
            for tokens, nbytes in batches:
                advance(tokens)
                written += nbytes
                if signal := interrupted():
                    raise RunInterruptedError(signal, RESUME)
        self._seal_what_others_left()
        return written

    def _seal_what_others_left(self) -> None:
        """Make shards of the journals whose writers are gone: killed, or actors of Ray."""
        CacheFolder(
            self.folder,
            self.fingerprint.digest,
            sums=self.config.sums_only,
            tolerance=record_tolerance(self.fingerprint.hard),
        ).seal_idle()

    def _batches(self) -> Generator[tuple[int, int], None, None]:
        """Score; yield tokens scored and bytes written, as they come in; at the end all is safe."""
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
