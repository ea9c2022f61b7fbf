"""Where the reference's half of the log-ratio comes from: a model, an adapter, or a cache."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from logratio.logps.batch import Batch, Layout, TargetTokens, onto
from logratio.logps.completion import score
from logratio.training import run_folder
from logratio.training.config import Precision, TrainConfig
from logratio.training.fingerprint import (
    COMPUTE_DTYPE,
    Fingerprint,
    model_fingerprint,
    stored_fingerprint,
)
from logratio.training.models import load_model, precision_of
from logratio.training.validation import reference_kind


class StaleCacheError(LogratioError, ValueError):
    """The cache holds no log-probs, or not all, of the reference that is asked for."""


class Reference(Protocol):
    """Anything that knows the reference's log-probs of a batch."""

    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]`, detached, aligned with `batch.targets`."""
        ...

    def sums(self, batch: Batch) -> Tensor:
        """Return the tokens that count of each completion, added up: float64 `[N]`."""
        ...


class PerToken(ABC):
    """A reference that knows every token: its sums follow."""

    @abstractmethod
    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]`, detached."""

    def sums(self, batch: Batch) -> Tensor:
        """Return the tokens that count of each completion, added up: float64 `[N]`."""
        return batch.targets.sums(self.logps(batch))


class FrozenReference(PerToken):
    """A second model, in memory beside the policy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]`, computed now."""
        return score(self.model, batch)


class AdapterReference(PerToken):
    """The policy without its adapters: the base model, at no memory."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]`, computed now with the adapters off and no dropout."""
        with self.policy.disable_adapter(), evaluating(self.policy):  # type: ignore[operator]  # peft's
            return score(self.policy, batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep `model` in eval mode inside the block, where it draws no random number."""
    trained = [module for module in model.modules() if module.training]
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Keep `model` in eval mode inside the block, and the generators as they were after it."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with evaluating(model), torch.random.fork_rng([*devices]):
        yield


def cache_folder(root: str | Path, fingerprint: Fingerprint) -> Path:
    """Return the folder of one reference below a cache's root."""
    return Path(root) / fingerprint.name


def open_cache(
    root: str | Path, fingerprint: Fingerprint, *, sums: bool = False, pread: bool = False
) -> CacheReader:
    """Open the log-probs, or the `sums`, of one reference.

    Raises:
        StaleCacheError: the cache was made with another reference; names the fields that differ.
        DamagedFingerprintError: the fingerprint beside the log-probs was altered.
        CorruptCacheError: a journal was altered.
    """
    folder = sums_folder(root, fingerprint) if sums else cache_folder(root, fingerprint)
    if not folder.is_dir():
        raise StaleCacheError(_explain_miss(Path(root), fingerprint))
    stored_conditions(folder)
    return open_folder(folder, fingerprint, sums=sums, pread=pread)


def open_folder(
    folder: Path, fingerprint: Fingerprint, *, sums: bool = False, pread: bool = False
) -> CacheReader:
    """Open a folder that is this reference's, with the tolerance that its precision asks for."""
    tolerance = record_tolerance(fingerprint.hard)
    return CacheReader.open(folder, fingerprint.digest, sums=sums, pread=pread, tolerance=tolerance)


def sums_folder(root: str | Path, fingerprint: Fingerprint) -> Path:
    """Return the folder of one reference's sums below a cache's root."""
    return Path(root) / f"{fingerprint.name}.sums"


def holds_sums_only(root: str | Path, fingerprint: Fingerprint) -> bool:
    """Tell whether a cache has the sums of a reference and not its tokens."""
    folders = cache_folder(root, fingerprint), sums_folder(root, fingerprint)
    return not folders[0].is_dir() and folders[1].is_dir()


def _explain_miss(root: Path, fingerprint: Fingerprint) -> str:
    advice = "run `logratio precompute` with this --model and --precision to fill it"
    others = sorted(root.glob(f"*/{FINGERPRINT_FILE}"))
    if not others:
        return f"{root}: no reference cache here; {advice}"
    found = "; ".join(_explain(path, fingerprint) for path in others)
    if filled := _filled_in(others, fingerprint):
        return (
            f"{root}: this cache was filled with --precision {filled}, and this run computes in "
            f"{fingerprint.precision} ({found}): give --precision {filled} here, or run "
            f"`logratio precompute` with --precision {fingerprint.precision}"
        )
    return f"{root}: this cache was made with another reference ({found}); {advice}"


def _filled_in(paths: Sequence[Path], fingerprint: Fingerprint) -> Precision | None:
    """Return the precision of a stored reference that differs from this one in nothing else."""
    for path in paths:
        with suppress(DamagedFingerprintError):
            stored = stored_fingerprint(path)
            if fingerprint.differences(stored.hard) == [COMPUTE_DTYPE]:
                return stored.precision
    return None


def _explain(path: Path, fingerprint: Fingerprint) -> str:
    try:
        return f"{path.parent.name} differs in {fingerprint.explain(stored_fingerprint(path).hard)}"
    except DamagedFingerprintError as error:
        return str(error)


def stored_conditions(folder: Path) -> list[Mapping[str, Any]]:
    """Return the soft fields that a cache's folder was filled under, one mapping a kind of writer.

    Raises:
        DamagedFingerprintError: the fingerprint in the folder is not that of its own fields, or a
            file of conditions cannot be read.
    """
    identity = folder / FINGERPRINT_FILE
    found = [stored_fingerprint(identity).soft] if identity.exists() else []
    return [*found, *read_conditions(folder)]


def soft_differences(folder: Path, soft: Mapping[str, str]) -> dict[str, str]:
    """Return each soft field of which a cache's folder knows another value than `soft` has."""
    found: dict[str, str] = {}
    for stored in stored_conditions(folder):
        for name in sorted(stored.keys() & soft.keys()):
            if stored[name] != soft[name]:
                found[name] = f"{name} {stored[name]} (here {soft[name]})"
    return dict(sorted(found.items()))


HIGHEST = 1e-3
"""A log-prob above 0 by more is no rounding: the cache refuses it too."""


class ImpossibleLogpError(LogratioError, ArithmeticError):
    """A log-prob that no model can mean: not finite, or above 0."""


class CachedReference(PerToken):
    """Log-probs read from a cache by row; keys are joined to rows once, here."""

    def __init__(self, store: Store, reader: CacheReader, folder: Path) -> None:
        self._reader, self.folder = reader, folder
        self._rows = _found(reader.join(store.keys()), store, folder)

    def over(self, store: Store) -> "CachedReference":
        """Return the same cache's log-probs of another store."""
        return CachedReference(store, self._reader, self.folder)

    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]` as they were written."""
        return onto(self._read(batch.targets), batch.targets.target_ids.device)

    def sums(self, batch: Batch) -> Tensor:
        """Return float64 `[N]`, added up on the host: a number a completion goes to the device."""
        targets = batch.targets
        return onto(targets.host_sums(self._read(targets)), targets.target_ids.device)

    def _read(self, targets: TargetTokens) -> np.ndarray:
        _, logps = self._reader.read(self._rows[targets.rows])
        if len(logps) != len(targets.target_ids):
            raise StaleCacheError(
                f"[E604] the cache holds {len(logps)} tokens where the batch has "
                f"{len(targets.target_ids)}"
            )
        return logps


class CachedSums:
    """Sums read from a cache that holds nothing else; enough for every loss of sums."""

    def __init__(self, store: Store, reader: CacheReader, folder: Path) -> None:
        self._reader, self.folder = reader, folder
        self._rows = _found(reader.join(store.sum_keys()), store, folder)

    def over(self, store: Store) -> "CachedSums":
        """Return the same cache's sums of another store."""
        return CachedSums(store, self._reader, self.folder)

    def logps(self, batch: Batch) -> Tensor:
        """Refuse: they were never written.

        Raises:
            StaleCacheError: always.
        """
        raise StaleCacheError(
            f"{self.folder}: this cache holds sums of completions, and log-probs of tokens are "
            "asked for; run `logratio precompute` without --sums-only"
        )

    def sums(self, batch: Batch) -> Tensor:
        """Return float64 `[N]` as they were written."""
        targets = batch.targets
        counts, sums = self._reader.read_sums(self._rows[targets.rows])
        lengths = targets.host_sums(np.ones(len(targets.counted))).astype(np.int64)
        if not np.array_equal(counts, lengths):
            raise StaleCacheError(
                f"[E604] the cache holds sums of {counts.tolist()} tokens where the batch has "
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
    """Open the cache, if there is one, and find every completion in it.

    Raises:
        StaleCacheError: the cache is of another model, or lacks completions.
        DamagedFingerprintError: the fingerprint beside the log-probs was altered.
    """
    if config.cache is None:
        return None
    fingerprint = model_fingerprint(config.reference or config.model, precision_of(config))
    pread = config.read_mode == "pread"
    if holds_sums_only(config.cache, fingerprint):
        reader = open_cache(config.cache, fingerprint, sums=True, pread=pread)
        return CachedSums(store, reader, sums_folder(config.cache, fingerprint))
    reader = open_cache(config.cache, fingerprint, pread=pread)
    return CachedReference(store, reader, cache_folder(config.cache, fingerprint))


def check_possible(logps: np.ndarray, store: Store, layout: Layout) -> None:
    """Refuse log-probs, float32 `[S]`, that no model can mean, before they are written.

    Raises:
        ImpossibleLogpError: one is not finite (E602) or above 0 (E603); names the record.
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


def build_reference(config: TrainConfig, policy: nn.Module) -> Reference | None:
    """Make the reference that `reference_kind` names, unless it is a cache."""
    kind, source = reference_kind(config), config.reference or config.model
    if kind == "adapter":
        return AdapterReference(policy)
    if kind == "frozen":
        device = next(policy.parameters()).device
        return FrozenReference(
            load_model(source, device=device, precision=precision_of(config), frozen=True)
        )
    return None
