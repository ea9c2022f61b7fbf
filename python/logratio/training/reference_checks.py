"""Start-up checks of the reference log-probs and the first loss."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import CacheReader, Store, StoreWriter
from logratio.data.feed import lay_out
from logratio.data.store.load import source_names
from logratio.errors import LogratioError
from logratio.logps.attention.interface import NAME
from logratio.logps.batch import Batch, shape_for, to_torch
from logratio.logps.completion import score, transformer
from logratio.training.config import Precision, TrainConfig
from logratio.training.fingerprint import Fingerprint, model_fingerprint, versions
from logratio.training.losses import PAIR_LOSSES, Objective
from logratio.training.models import autocast, precision_of
from logratio.training.reference import (
    AdapterReference,
    CachedReference,
    CachedSums,
    Reference,
    soft_differences,
    undisturbed,
)
from logratio.training.validation import beta_of, needs_reference

SAMPLE = 32
"""Completions that are scored again, evenly spread over the data: the same ones in every run."""

WALK_TOKENS = 64
"""Up to so many tokens the bound of a sum is constant; beyond, rounding adds up as a random walk
does, with the square root of their number."""

RELATIVE = 1e-5
"""Of a sequence's sum, what the rounding of its tokens to float32 may move it by besides."""

Scorer = Callable[[Batch], Tensor]
"""What makes log-probs of a batch: float32 `[S]`."""

Inspector = Callable[[Batch, Tensor, Tensor], None]
"""What looks at a batch and its sums, float64 `[N]`: scored now, and stored."""


@dataclass(frozen=True)
class Tolerance:
    """What rounding may move a log-prob by, in nats.

    Attributes:
        token: of one token.
        sequence: of the sum of a completion of at most `WALK_TOKENS` tokens.
    """

    token: float
    sequence: float

    def of_sums(self, lengths: Tensor) -> Tensor:
        """Return the bound of each sum of `lengths` tokens, `[N]` to float64 `[N]`."""
        return self.sequence * (lengths.double() / WALK_TOKENS).clamp(min=1).sqrt()


TOLERANCES: Mapping[tuple[Precision, bool], Tolerance] = {
    ("fp32", True): Tolerance(5e-4, 1e-3),
    ("fp32", False): Tolerance(1e-3, 2e-3),
    ("bf16", True): Tolerance(0.5, 2.0),
    ("bf16", False): Tolerance(0.75, 3.0),
    ("bf16-weights", True): Tolerance(0.5, 2.0),
    ("bf16-weights", False): Tolerance(0.75, 3.0),
}
"""By precision and whether layout, attention and device are those that the cache was made with.

Measured on a CPU, torch 2.15, with story models of 0.26 and 3.2 million parameters on 100 real
pairs, tokens down to -34 nats and sums down to -208: largest difference of a token, of a sum.

    fp32, same layout, groups alone or 16 at a time      0         0
    fp32, shared and padded                              2.3e-5    6.7e-5
    bf16, same layout, groups alone or 16 at a time      0         0
    bf16, shared and padded                              0.19      0.64
    bf16-weights, same layout, alone or 16 at a time     0         0
    bf16-weights, shared and padded                      0.35      0.93

A GPU chooses kernels by the batch's shape, and larger models round more often, so the bounds leave
room: 3 to 40 times what was seen. Another model is nats away."""


class UntrustedReferenceError(LogratioError, ValueError):
    """Log-probs that should be equal are further apart than rounding explains."""


def sample_rows(store: Store, rows: np.ndarray) -> Store:
    """Pick `SAMPLE` of these completions, int64 `[n]`, evenly spread, as a store of their own."""
    chosen = np.unique(rows[_spread(len(rows))])
    offsets = store.completion_offsets()
    owners = np.searchsorted(offsets, chosen, side="right") - 1
    wanted = {int(g): set((chosen[owners == g] - offsets[g]).tolist()) for g in np.unique(owners)}
    return _copy(store, wanted)


def sample_groups(store: Store) -> Store:
    """Pick `SAMPLE` groups, evenly spread, as a store of their own."""
    groups = np.unique(_spread(len(store)))
    sizes = np.diff(store.completion_offsets())
    return _copy(store, {int(group): set(range(sizes[group])) for group in groups})


def _spread(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(SAMPLE, count)).astype(np.int64)


def _copy(store: Store, wanted: Mapping[int, set[int]]) -> Store:
    """Copy the wanted completions (by their number in their group) of each group."""
    writer, files = StoreWriter(), store.sources()
    for group, members in wanted.items():
        prompt, completions, masks, roles = store.group(group)
        kept = [k for k in range(len(completions)) if k in members]
        writer.push(
            prompt,
            np.concatenate([completions[k] for k in kept]),
            np.concatenate([masks[k] for k in kept]),
            np.array([len(completions[k]) for k in kept], dtype=np.uint32),
            roles[kept],
            int(files[0][group]),
            int(files[1][group]),
        )
    return writer.finish(store.metadata)


def recheck(
    sample: Store,
    layout: str,
    device: torch.device,
    scorer: Scorer,
    stored: Reference,
    bound: Tolerance,
    inspect: Inspector | None = None,
) -> float:
    """Score a sample now, compare it with what is stored, and return the largest gap in nats.

    The gap is one of tokens, or of sums where nothing else is stored.

    Args:
        sample: groups, as `sample_rows` and `sample_groups` pick them.
        layout: "shared", "tree" or "padded".
        device: where `scorer` wants its batches.
        scorer: the model that should be the reference: a batch to float32 `[S]`.
        stored: what should be that model's log-probs; a cache is looked up for the sample.
        bound: what rounding explains.
        inspect: called for each batch that is within the bound.

    Raises:
        UntrustedReferenceError: a log-prob differs by more, or is not finite; names the record.
        StaleCacheError: the cache does not hold the sample.
    """
    if isinstance(stored, CachedReference | CachedSums):
        stored = stored.over(sample)
    worst = 0.0
    shape = shape_for(layout, device)
    for group in range(len(sample)):
        rows = np.array([group], dtype=np.int64)
        batch = to_torch(lay_out(sample, rows, layout, **shape), device)
        (place,) = source_names(sample, [group])
        now, sums = scorer(batch), stored.sums(batch)
        worst = max(worst, _compare(now, sums, stored, batch, bound, place))
        if inspect:
            inspect(batch, batch.targets.sums(now), sums)
    return worst


def _compare(
    now: Tensor, sums: Tensor, stored: Reference, batch: Batch, bound: Tolerance, place: str
) -> float:
    gap = (batch.targets.sums(now) - sums).abs()
    what = f"of a completion of {place} under the model and {type(stored).__name__}"
    _refuse(gap, bound.of_sums(batch.targets.lengths) + RELATIVE * sums.abs(), what)
    if not isinstance(stored, CachedSums):
        gap = (now - stored.logps(batch)).abs()
        _refuse(gap, torch.full_like(gap, bound.token), what.replace("completion", "token", 1))
    return float(gap.max())


def tolerance(precision: Precision, soft: Collection[str]) -> Tolerance:
    """Return the bound for a cache whose conditions differ in these `soft` fields."""
    return TOLERANCES[precision, not {"layout", "attention", "device"} & set(soft)]


def _refuse(gap: Tensor, most: Tensor, what: str) -> None:
    if bool((gap <= most).all()):  # a NaN is not
        return
    worst = int(torch.where(gap.isnan(), torch.inf, gap - most).argmax())
    raise UntrustedReferenceError(
        f"the log-probs {what} differ by {float(gap[worst]):.3g} nats, and should be equal (at "
        f"most {float(most[worst]):.3g} is rounding): do not trust it"
    )


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


def starts_at_reference(config: TrainConfig) -> bool:
    """Tell whether the policy equals the reference before its first update."""
    if not needs_reference(config):
        return False
    if config.reference is None:
        return True
    start: Fingerprint = model_fingerprint(config.model, precision_of(config))
    return start.digest == model_fingerprint(config.reference, precision_of(config)).digest
