"""Where the reference's half of the log-ratio comes from: a strategy.

`FrozenReference` holds a second model, `AdapterReference` is the policy with its adapters off, and
those of `cached.py` hold no model: they read a folder of a cache, which is found here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from logratio._rust import CacheReader
from logratio.cache import DamagedFingerprintError, record_tolerance
from logratio.cache.conditions import read_conditions
from logratio.cache.identity import FINGERPRINT_FILE
from logratio.errors import LogratioError
from logratio.logps.completion import score
from logratio.logps.tensors import Batch
from logratio.training.config import Precision
from logratio.training.fingerprint import COMPUTE_DTYPE, Fingerprint, stored_fingerprint


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
