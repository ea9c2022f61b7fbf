"""Before an update or a block of a cache: the reference and the first loss are as they must be."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import CacheReader, Store
from logratio.logps.attention import NAME
from logratio.logps.completion import score, transformer
from logratio.logps.tensors import Batch
from logratio.training.cached import CachedReference, CachedSums
from logratio.training.canary import (
    RELATIVE,
    Inspector,
    Scorer,
    Tolerance,
    UntrustedReferenceError,
    recheck,
    sample_groups,
    sample_rows,
    tolerance,
)
from logratio.training.config import Precision, TrainConfig
from logratio.training.fingerprint import versions
from logratio.training.losses import PAIR_LOSSES
from logratio.training.models import autocast, precision_of
from logratio.training.objective import Objective
from logratio.training.reference import (
    AdapterReference,
    Reference,
    soft_differences,
    undisturbed,
)
from logratio.training.setup import beta_of, starts_at_reference


def conditions(model: nn.Module, layout: str) -> dict[str, str]:
    """Return the soft fields of this process, with its model loaded."""
    inner = transformer(model)
    is_cuda = inner.device.type == "cuda"
    return versions() | {
        "layout": layout,
        "attention": NAME if layout != "padded" else str(inner.config._attn_implementation),
        "device": torch.cuda.get_device_name(inner.device) if is_cuda else inner.device.type,
    }


def check_hits(
    model: nn.Module,
    store: Store,
    reader: CacheReader,
    folder: Path,
    layout: str,
    precision: Precision,
    *,
    sums: bool,
) -> str | None:
    """Score some of the completions that a cache already has again, before any is added.

    Args:
        model: the reference, loaded.
        store: the data.
        reader: of the cache.
        folder: where it lies, with the conditions that it was filled under.
        layout: in which the model is scored.
        precision: in which it computes.
        sums: whether the cache is of sums.

    Returns:
        A sentence where entries were made under other soft conditions.

    Raises:
        UntrustedReferenceError: an entry is not what the model says; names the record.
        DamagedFingerprintError: the cache's fingerprint was altered.
    """
    soft = soft_differences(folder, conditions(model, layout))
    hits = np.flatnonzero(reader.join(store.sum_keys() if sums else store.keys()) >= 0)
    if len(hits) == 0:
        return None
    sample = sample_rows(store, hits)
    stored = (CachedSums if sums else CachedReference)(sample, reader, folder)
    bound = _bound(model, precision, soft)
    gap = _gap(model, sample, layout, precision, stored, bound, lambda batch: score(model, batch))
    return _sentence(folder, soft, gap, sample)


def check_start(
    config: TrainConfig,
    store: Store,
    policy: nn.Module,
    reference: Reference,
    layout: str,
    objective: Objective | None,
) -> str | None:
    """Compare the reference with what is in memory and should equal it, before any update.

    At the first update of a policy that begins as its reference, that is the policy, and the loss
    must have its initial value there. For adapters with a cache it is the policy with them off,
    after a checkpoint too. Dropout is off, and no generator of random numbers moves.

    Args:
        config: of the run.
        store: the data.
        policy: as it was loaded, or as a checkpoint left it.
        reference: of the run.
        layout: of the policy.
        objective: the loss; None where a checkpoint was loaded.

    Returns:
        A sentence where the cache was made under other soft conditions.

    Raises:
        UntrustedReferenceError: the two, or the loss and its initial value, differ by more than
            rounding explains.
        DamagedFingerprintError: the cache's fingerprint was altered.
    """
    soft: dict[str, str] = {}
    if isinstance(reference, CachedReference | CachedSums):
        soft = soft_differences(reference.folder, conditions(policy, layout))
    precision, sample, gap = precision_of(config), sample_groups(store), None
    bound = _bound(policy, precision, soft)
    if scorer := _equal_in_memory(config, policy, is_first=objective is not None):
        inspect = _InitialValue(config, objective, bound) if objective else None
        gap = _gap(policy, sample, layout, precision, reference, bound, scorer, inspect)
    if isinstance(reference, CachedReference | CachedSums):
        return _sentence(reference.folder, soft, gap, sample)
    return None


def _bound(model: nn.Module, precision: Precision, soft: Collection[str]) -> Tolerance:
    """Return what rounding explains; products of 8 and 4 bits round as coarsely as bf16."""
    is_quantized = getattr(transformer(model), "is_quantized", False)
    return tolerance("bf16" if is_quantized else precision, soft)


def _equal_in_memory(config: TrainConfig, policy: nn.Module, *, is_first: bool) -> Scorer | None:
    """Return what scores as the reference does without being it, if anything does."""
    if not starts_at_reference(config):
        return None
    if is_first:
        return lambda batch: score(policy, batch)
    return AdapterReference(policy).logps if config.lora and config.cache else None


@torch.no_grad()
def _gap(
    model: nn.Module,
    sample: Store,
    layout: str,
    precision: Precision,
    stored: Reference,
    bound: Tolerance,
    scorer: Scorer,
    inspect: Inspector | None = None,
) -> float:
    device = transformer(model).device
    with undisturbed(model), autocast(precision, device):
        return recheck(sample, layout, device, scorer, stored, bound, inspect)


def _sentence(folder: Path, soft: dict[str, str], gap: float | None, sample: Store) -> str | None:
    """Say under which other conditions a cache was filled, and what came of scoring it again."""
    if not soft:
        return None
    checked = (
        "the reference is not in memory, so nothing could be scored again to compare"
        if gap is None
        else f"{sample.completions} completions scored again are at most {gap:.2g} nats away"
    )
    return f"{folder}: made under {', '.join(soft.values())}; {checked}"


class _InitialValue:
    """Compares a loss at policy = reference with the value that it is known to have there."""

    def __init__(self, config: TrainConfig, objective: Objective, bound: Tolerance) -> None:
        known = PAIR_LOSSES[config.loss].initial_value
        self.expected = known(beta_of(config)) if known else None
        self.loss, self.objective, self.bound = config.loss, objective, bound

    def __call__(self, batch: Batch, now: Tensor, stored: Tensor) -> None:
        """Refuse a loss beyond what the bound of the log-probs can move it by.

        Args:
            batch: pairs.
            now: sums under the policy, float64 `[N]`.
            stored: sums under the reference, float64 `[N]`.
        """
        if self.expected is None:
            return
        lengths = batch.targets.lengths
        shift = self.bound.of_sums(lengths) + RELATIVE * stored.abs()
        shift[1::2] *= -1  # chosen up and rejected down, or the other way round
        level, up, down = (
            self.objective.losses(stored + by, stored, lengths)
            for by in (torch.zeros_like(shift), shift, -shift)
        )
        most = torch.maximum((up - level).abs(), (down - level).abs()) + 1e-6 * self.expected
        gap = (self.objective.losses(now, stored, lengths) - self.expected).abs()
        if not bool((gap <= most).all()):
            raise UntrustedReferenceError(
                f"policy and reference are the same model, and the loss {self.loss} begins at "
                f"{self.expected + float(gap.max()):.6g} in place of {self.expected:.6g} (at most "
                f"{float(most.min()):.2g} is rounding)"
            )
