"""Where the reference's half of the log-ratio comes from: a strategy.

`CachedReference` reads a cache and holds no model, `FrozenReference` holds a second model,
`AdapterReference` is the policy with its adapters off.
"""

import json
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from logratio._rust import CacheReader, Store
from logratio.training.attention import shared_prompts
from logratio.training.fingerprint import Fingerprint
from logratio.training.logps import completion_logps, transformer
from logratio.training.tensors import Batch, SharedBatch

FINGERPRINT_FILE = "fingerprint.json"


class StaleCacheError(ValueError):
    """The cache holds no log-probs, or not all, of the reference that is asked for."""


class Reference(Protocol):
    """Anything that knows the reference's log-probs of a batch."""

    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]`, detached, aligned with `batch.targets`."""
        ...


class CachedReference:
    """Log-probs read from a cache by row; keys are joined to rows once, here."""

    def __init__(self, store: Store, reader: CacheReader, source: str) -> None:
        self._reader = reader
        self._rows = reader.join(store.keys())
        if missing := int((self._rows < 0).sum()):
            raise StaleCacheError(
                f"{source}: {missing:,} of {len(self._rows):,} completions are not in the cache; "
                "run `logratio precompute` with the same --model, --data and limits to add them"
            )

    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]` as they were written."""
        _, logps = self._reader.read(self._rows[batch.targets.rows])
        if len(logps) != len(batch.targets.target_ids):
            raise StaleCacheError(
                f"[E604] the cache holds {len(logps)} tokens where the batch has "
                f"{len(batch.targets.target_ids)}"
            )
        return torch.from_numpy(logps).to(batch.targets.target_ids.device)


class FrozenReference:
    """A second model, in memory beside the policy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]`, computed now."""
        return score(self.model, batch)


class AdapterReference:
    """The policy without its adapters: the base model, at no memory."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]`, computed now with the adapters off."""
        with self.policy.disable_adapter():  # type: ignore[operator]  # peft's
            return score(self.policy, batch)


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Return `completion_logps`, in the attention that the batch's layout needs."""
    if not isinstance(batch, SharedBatch):
        return completion_logps(model, batch)
    with shared_prompts(transformer(model)):
        return completion_logps(model, batch)


def cache_folder(root: str | Path, fingerprint: Fingerprint) -> Path:
    """Return the folder of one reference below a cache's root."""
    return Path(root) / fingerprint.name


def open_cache(root: str | Path, fingerprint: Fingerprint) -> CacheReader:
    """Open the log-probs of one reference.

    Raises:
        StaleCacheError: the cache was made with another reference; names the fields that differ.
        CorruptCacheError: a journal was altered.
    """
    folder = cache_folder(root, fingerprint)
    if not folder.is_dir():
        raise StaleCacheError(_explain_miss(Path(root), fingerprint))
    return CacheReader.open(folder, fingerprint.digest)


def _explain_miss(root: Path, fingerprint: Fingerprint) -> str:
    advice = "run `logratio precompute` with this --model and --precision to fill it"
    others = sorted(root.glob(f"*/{FINGERPRINT_FILE}"))
    if not others:
        return f"{root}: no reference cache here; {advice}"
    found = [
        f"{path.parent.name} differs in {', '.join(fingerprint.differences(hard)) or 'nothing'}"
        for path in others
        if (hard := json.loads(path.read_text())["hard"])
    ]
    return f"{root}: this cache was made with another reference ({'; '.join(found)}); {advice}"
