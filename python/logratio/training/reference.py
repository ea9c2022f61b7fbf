"""Sources of the reference's log-probs: a frozen model, the policy's base, or a cache."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import CacheReader, Store
from logratio.cache.identity import (
    FINGERPRINT_FILE,
    DamagedFingerprintError,
    read_conditions,
    record_tolerance,
)
from logratio.data.store.load import source_names
from logratio.errors import LogratioError
from logratio.logps.batch import Batch, Layout, TargetTokens
from logratio.logps.completion import score, transformer
from logratio.logps.divergence import LiveModel
from logratio.logps.sequences import onto
from logratio.training import run_folder
from logratio.training.config import PathLike, TrainConfig
from logratio.training.fingerprint import (
    COMPUTE_DTYPE,
    QUANTIZATION,
    Fingerprint,
    reference_fingerprint,
    stored_fingerprint,
)
from logratio.training.methods.logps import MISMATCHED
from logratio.training.methods.objective import Objective
from logratio.training.models import load_model, precision_of
from logratio.training.policy import as_reference
from logratio.training.validation import reference_kind


class StaleCacheError(LogratioError, ValueError):
    """The cache lacks some or all log-probs of the requested reference."""


class Reference(Protocol):
    """A source of the reference's log-probs for a batch."""

    def logps(self, batch: Batch) -> Tensor:
        """Return log-probs of tokens, detached, float32 `[S]`, aligned with `batch.targets`."""
        ...

    def sums(self, batch: Batch) -> Tensor:
        """Return the sum over the counted tokens of each completion, float64 `[N]`."""
        ...


class PerToken(ABC):
    """A reference with log-probs of tokens, from which the sums are computed."""

    @abstractmethod
    def logps(self, batch: Batch) -> Tensor:
        """Return log-probs of tokens, detached, float32 `[S]`."""

    def sums(self, batch: Batch) -> Tensor:
        """Return the sum over the counted tokens of each completion, float64 `[N]`."""
        return batch.targets.sums(self.logps(batch))


class UniformReference(PerToken):
    """A reference for study: every token has the probability 1 / `vocabulary`."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def logps(self, batch: Batch) -> Tensor:
        """Return the same log-prob for each token, float32 `[S]`."""
        ids = batch.targets.target_ids
        return torch.full(ids.shape, -math.log(self.vocabulary), device=ids.device)


class FrozenReference(PerToken):
    """A second model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Score the batch; return float32 `[S]`."""
        return score(self.model, batch)


class AdapterReference(PerToken):
    """The policy without its trained adapter, or with that as it was at the start of the run.

    It needs no second model: see `policy.as_reference`.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Score the batch as the reference, in eval mode; return float32 `[S]`."""
        with _as_reference_in_eval(self.policy):
            return score(self.policy, batch)


def live_model(reference: Reference) -> LiveModel:
    """Return the model of a reference that is in memory."""
    if isinstance(reference, AdapterReference):
        policy = reference.policy
        return LiveModel(policy, lambda: _as_reference_in_eval(policy))
    assert isinstance(reference, FrozenReference)
    return LiveModel(reference.model)


@contextmanager
def _as_reference_in_eval(policy: nn.Module) -> Iterator[None]:
    with as_reference(policy), evaluating(policy):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode inside the block, so that it uses no random numbers."""
    trained = [module for module in model.modules() if module.training]
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode inside the block, and restore the random states after it."""
    with evaluating(model), same_random_state(model):
        yield


def same_random_state(model: nn.Module) -> AbstractContextManager[None]:
    """Restore torch's random states, of the host and the model's devices, after the block."""
    return torch.random.fork_rng([*{p.device for p in model.parameters() if p.is_cuda}])


def cache_folder(root: str | Path, fingerprint: Fingerprint) -> Path:
    """Return the folder of a reference's log-probs in the cache at `root`."""
    return Path(root) / fingerprint.name


def open_cache(
    root: str | Path, fingerprint: Fingerprint, *, sums: bool = False, pread: bool = False
) -> CacheReader:
    """Open the cached log-probs of a reference.

    Args:
        root: Root folder of the cache.
        fingerprint: Fingerprint of the reference.
        sums: Open the sums of completions instead of the log-probs of tokens.
        pread: Read sealed shards with pread instead of mmap.

    Raises:
        StaleCacheError: The cache was filled with a different reference; the message names the
            fields that differ.
        DamagedFingerprintError: The stored fingerprint was altered.
        CorruptCacheError: A journal was altered.
    """
    folder = sums_folder(root, fingerprint) if sums else cache_folder(root, fingerprint)
    if not folder.is_dir():
        raise StaleCacheError(_explain_miss(Path(root), fingerprint))
    stored_conditions(folder)
    return open_folder(folder, fingerprint, sums=sums, pread=pread)


def open_folder(
    folder: Path, fingerprint: Fingerprint, *, sums: bool = False, pread: bool = False
) -> CacheReader:
    """Open a reference's cache folder, with the record tolerance of its precision."""
    tolerance = record_tolerance(fingerprint.hard)
    return CacheReader.open(folder, fingerprint.digest, sums=sums, pread=pread, tolerance=tolerance)


def sums_folder(root: str | Path, fingerprint: Fingerprint) -> Path:
    """Return the folder of a reference's sums in the cache at `root`."""
    return Path(root) / f"{fingerprint.name}.sums"


def holds_sums_only(root: str | Path, fingerprint: Fingerprint) -> bool:
    """Return whether a cache has the sums of a reference, but not its log-probs of tokens."""
    folders = cache_folder(root, fingerprint), sums_folder(root, fingerprint)
    return not folders[0].is_dir() and folders[1].is_dir()


def _explain_miss(root: Path, fingerprint: Fingerprint) -> str:
    bits = fingerprint.quantization
    flags = "--model, --precision and --quantization" if bits else "--model and --precision"
    advice = f"run `logratio precompute` with this {flags} to fill it"
    others = sorted(root.glob(f"*/{FINGERPRINT_FILE}"))
    if not others:
        return f"{root}: no reference cache here; {advice}"
    found = "; ".join(_explain(path, fingerprint) for path in others)
    near = _differs_only_in(COMPUTE_DTYPE, others, fingerprint)
    if near and (filled := near.precision):
        return (
            f"{root}: this cache was filled with --precision {filled}, and this run computes in "
            f"{fingerprint.precision} ({found}): give --precision {filled} here, or run "
            f"`logratio precompute` with --precision {fingerprint.precision}"
        )
    if near := _differs_only_in(QUANTIZATION, others, fingerprint):
        return (
            f"{root}: this cache was filled with {_bits(near)}, and this run's reference has "
            f"{_bits(fingerprint)} ({found}): {advice}"
        )
    return f"{root}: this cache was filled with a different reference ({found}); {advice}"


def _bits(fingerprint: Fingerprint) -> str:
    bits = fingerprint.quantization
    return f"--quantization {bits}" if bits else "no --quantization"


def _differs_only_in(
    name: str, paths: Sequence[Path], fingerprint: Fingerprint
) -> Fingerprint | None:
    """Return a stored fingerprint that differs only in one field, or None."""
    for path in paths:
        with suppress(DamagedFingerprintError):
            stored = stored_fingerprint(path)
            if fingerprint.differences(stored.hard) == [name]:
                return stored
    return None


def _explain(path: Path, fingerprint: Fingerprint) -> str:
    try:
        return f"{path.parent.name} differs in {fingerprint.explain(stored_fingerprint(path).hard)}"
    except DamagedFingerprintError as error:
        return str(error)


def stored_conditions(folder: Path) -> list[Mapping[str, Any]]:
    """Return the soft fields under which a cache folder was filled, one mapping per set.

    Raises:
        DamagedFingerprintError: The stored fingerprint does not match its digest, or a file of
            conditions cannot be read.
    """
    identity = folder / FINGERPRINT_FILE
    found = [stored_fingerprint(identity).soft] if identity.exists() else []
    return [*found, *read_conditions(folder)]


def soft_differences(folder: Path, soft: Mapping[str, str]) -> dict[str, str]:
    """Describe each soft field that was different when a cache folder was filled, by name."""
    found: dict[str, str] = {}
    for stored in stored_conditions(folder):
        for name in sorted(stored.keys() & soft.keys()):
            if stored[name] != soft[name]:
                found[name] = f"{name} {stored[name]} (here {soft[name]})"
    return dict(sorted(found.items()))


HIGHEST = 1e-3
"""Largest log-prob that rounding can explain; the cache refuses higher ones too."""


class ImpossibleLogpError(LogratioError, ArithmeticError):
    """A log-prob is not finite or is above 0."""


class CachedReference(PerToken):
    """Log-probs of tokens read from a cache. Completions are looked up once, on construction."""

    def __init__(self, store: Store, reader: CacheReader, folder: Path) -> None:
        self._reader, self.folder = reader, folder
        self._rows = _found(reader.join(store.keys()), store, folder)

    def over(self, store: Store) -> "CachedReference":
        """Return a reference that reads from the same cache for another store."""
        return CachedReference(store, self._reader, self.folder)

    def logps(self, batch: Batch) -> Tensor:
        """Read the log-probs of a batch from the cache, float32 `[S]`."""
        return onto(self._read(batch.targets), batch.targets.target_ids.device)

    def sums(self, batch: Batch) -> Tensor:
        """Sum on the host, so that only one value per completion is copied to the device."""
        targets = batch.targets
        return onto(targets.host_sums(self._read(targets)), targets.target_ids.device)

    def _read(self, targets: TargetTokens) -> np.ndarray:
        _, logps = self._reader.read(self._rows[targets.rows])
        if len(logps) != len(targets.target_ids):
            raise StaleCacheError(
                f"[E604] the cache has {len(logps)} tokens where the batch has "
                f"{len(targets.target_ids)}"
            )
        return logps


class CachedSums:
    """Sums of completions read from a cache without log-probs of tokens."""

    def __init__(self, store: Store, reader: CacheReader, folder: Path) -> None:
        self._reader, self.folder = reader, folder
        self._rows = _found(reader.join(store.sum_keys()), store, folder)

    def over(self, store: Store) -> "CachedSums":
        """Return a reference that reads from the same cache for another store."""
        return CachedSums(store, self._reader, self.folder)

    def logps(self, batch: Batch) -> Tensor:
        """Not available: the cache contains only sums.

        Raises:
            StaleCacheError: Always.
        """
        raise StaleCacheError(
            f"{self.folder}: this cache contains only sums of completions, but log-probs of tokens "
            "are needed; run `logratio precompute` without --sums-only"
        )

    def sums(self, batch: Batch) -> Tensor:
        """Read the sums of a batch from the cache, float64 `[N]`."""
        targets = batch.targets
        counts, sums = self._reader.read_sums(self._rows[targets.rows])
        lengths = targets.host_sums(np.ones(len(targets.counted))).astype(np.int64)
        if not np.array_equal(counts, lengths):
            raise StaleCacheError(
                f"[E604] the cache has sums of {counts.tolist()} tokens where the batch has "
                f"{lengths.tolist()}"
            )
        return onto(sums, targets.target_ids.device)


def _found(rows: np.ndarray, store: Store, folder: Path) -> np.ndarray:
    if missing := int((rows < 0).sum()):
        raise StaleCacheError(
            f"{folder}: {missing:,} of {len(rows):,} completions are not in the cache; run "
            "`logratio precompute` with the same --model, --data and limits, or give --precompute, "
            f"to add them{run_folder.date_miss(folder, run_folder.date_of_store(store))}"
        )
    return rows


def cached_reference(config: TrainConfig, store: Store) -> CachedReference | CachedSums | None:
    """Open the cache of a run and look up every completion; None if the run uses no cache.

    Raises:
        StaleCacheError: The cache belongs to a different reference, or lacks completions.
        DamagedFingerprintError: The stored fingerprint was altered.
    """
    if config.cache is None:
        return None
    try:
        return _looked_up(config, config.cache, store)
    except StaleCacheError as error:
        if MISMATCHED in store.roles():
            error.add_note(
                f"--loss {config.loss} compares with answers to other prompts, which "
                "`logratio precompute --mismatched` scores too"
            )
        raise


def _looked_up(config: TrainConfig, cache: PathLike, store: Store) -> CachedReference | CachedSums:
    fingerprint = reference_fingerprint(config)
    pread = config.read_mode == "pread"
    if holds_sums_only(cache, fingerprint):
        if Objective.of(config).weighs_tokens or store.is_weighted:
            by = "the data" if store.is_weighted else f"--loss {config.loss}"
            raise StaleCacheError(
                f"{cache}: this cache has only sums of completions, and {by} weighs their tokens: "
                "run `logratio precompute` without --sums-only"
            )
        reader = open_cache(cache, fingerprint, sums=True, pread=pread)
        return CachedSums(store, reader, sums_folder(cache, fingerprint))
    reader = open_cache(cache, fingerprint, pread=pread)
    return CachedReference(store, reader, cache_folder(cache, fingerprint))


def check_possible(logps: np.ndarray, store: Store, layout: Layout) -> None:
    """Check that log-probs, float32 `[S]`, are finite and not above 0, before they are stored.

    Args:
        logps: Log-probs of a batch.
        store: Data of the batch.
        layout: Layout of the batch, to locate the record of a bad log-prob.

    Raises:
        ImpossibleLogpError: One is not finite (E602) or above 0 (E603); the message names the
            record.
    """
    if bool((logps <= HIGHEST).all() and np.isfinite(logps).all()):
        return
    first = int(np.flatnonzero(~((logps <= HIGHEST) & np.isfinite(logps)))[0])
    completion = int(np.searchsorted(layout.completion_offsets, first, side="right")) - 1
    row = int(layout.completions[completion])
    group = int(np.searchsorted(store.completion_offsets(), row, side="right")) - 1
    (place,) = source_names(store, [group])
    code = "E603" if np.isfinite(logps[first]) else "E602"
    raise ImpossibleLogpError(
        f"{place}: [{code}] the reference's log-prob of a token is {logps[first]}; nothing of its "
        "batch was written"
    )


def build_reference(
    config: TrainConfig,
    policy: nn.Module,
    load: Callable[[Callable[[str], nn.Module]], nn.Module] | None = None,
) -> Reference | None:
    """Create the reference of a run without a cache; None if the loss needs none.

    Args:
        config: Settings of the run.
        policy: The policy, on its device.
        load: Returns the model that a function builds on a device, for example in shards; None: on
            the policy's device.
    """
    kind = reference_kind(config)
    if kind == "uniform":
        return UniformReference(transformer(policy).config.get_text_config().vocab_size)
    if kind == "adapter":
        return AdapterReference(policy)
    if kind == "frozen":
        device = str(next(policy.parameters()).device)
        return FrozenReference((load or (lambda build: build(device)))(reference_builder(config)))
    return None


def reference_builder(config: TrainConfig) -> Callable[[str], nn.Module]:
    """Return a function that loads the reference of a run onto a device."""
    return lambda device: load_model(
        config.reference or config.model,
        device=device,
        quantization=config.quantization,
        precision=precision_of(config),
        frozen=True,
    )
