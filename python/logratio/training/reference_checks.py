"""Start-up checks of the reference log-probs and the first loss."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import CacheReader, Store, StoreWriter
from logratio.data.feed import FeedSettings, lay_out, micro_batches
from logratio.data.store.load import source_names
from logratio.errors import LogratioError
from logratio.logps.attention.interface import NAME
from logratio.logps.batch import Batch, TargetTokens, shape_for, to_torch
from logratio.logps.completion import score, transformer
from logratio.training.config import Precision, TrainConfig
from logratio.training.fingerprint import model_fingerprint, reference_fingerprint, versions
from logratio.training.methods.group_data import GroupData
from logratio.training.methods.objective import Objective
from logratio.training.models import autocast, precision_of, training_budget
from logratio.training.reference import (
    AdapterReference,
    CachedReference,
    CachedSums,
    Reference,
    side_effect_free,
    soft_differences,
)
from logratio.training.validation import needs_reference

SAMPLE = 32
"""Completions that are scored again, evenly spread over the data; the same in every run."""

WALK_TOKENS = 64
"""The tolerance of a sum is constant up to this many tokens. Beyond, rounding errors accumulate
like a random walk, with the square root of the number of tokens."""

RELATIVE = 1e-5
"""Additional tolerance relative to a sum, for the rounding of its tokens to float32."""

Scorer = Callable[[Batch], Tensor]
"""Computes the log-probs of a batch, float32 `[S]`."""


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that rounding can explain, in nats.

    Attributes:
        token: Tolerance of one token's log-prob.
        sequence: Tolerance of the sum of a completion with at most `WALK_TOKENS` tokens.
    """

    token: float
    sequence: float

    def of_sums(self, lengths: Tensor) -> Tensor:
        """Return the tolerance of sums over `lengths` tokens, `[N]` to float64 `[N]`."""
        return self.sequence * (lengths.double() / WALK_TOKENS).clamp(min=1).sqrt()


TOLERANCES: Mapping[tuple[Precision, bool], Tolerance] = {
    ("fp32", True): Tolerance(5e-4, 1e-3),
    ("fp32", False): Tolerance(1e-3, 2e-3),
    ("bf16", True): Tolerance(0.5, 2.0),
    ("bf16", False): Tolerance(0.75, 3.0),
    ("bf16-weights", True): Tolerance(0.5, 2.0),
    ("bf16-weights", False): Tolerance(0.75, 3.0),
}
"""Tolerances by precision, and by whether layout, attention and device equal the cache's.

Measured on a CPU, torch 2.15, with story models of 0.26 and 3.2 million parameters on 100 real
pairs, tokens down to -34 nats and sums down to -208: largest difference of a token, of a sum.

    fp32, same layout, groups alone or 16 at a time      0         0
    fp32, shared and padded                              2.3e-5    6.7e-5
    bf16, same layout, groups alone or 16 at a time      0         0
    bf16, shared and padded                              0.19      0.64
    bf16-weights, same layout, alone or 16 at a time     0         0
    bf16-weights, shared and padded                      0.35      0.93

A GPU selects kernels by the shape of a batch, and larger models have more rounding operations, so
the tolerances are 3 to 40 times the measured differences. Different models differ by whole nats."""


class UntrustedReferenceError(LogratioError, ValueError):
    """Log-probs that should be equal differ by more than rounding can explain."""


def sample_rows(store: Store, rows: np.ndarray) -> Store:
    """Return a store of `SAMPLE` of the completions `rows`, int64 `[n]`, evenly spread."""
    chosen = np.unique(rows[_spread(len(rows))])
    offsets = store.completion_offsets()
    owners = np.searchsorted(offsets, chosen, side="right") - 1
    wanted = {int(g): set((chosen[owners == g] - offsets[g]).tolist()) for g in np.unique(owners)}
    return _copy(store, wanted)


def sample_groups(store: Store) -> Store:
    """Return a store of `SAMPLE` groups, evenly spread over `store`."""
    groups = np.unique(_spread(len(store)))
    sizes = np.diff(store.completion_offsets())
    return _copy(store, {int(group): set(range(sizes[group])) for group in groups})


def _spread(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(SAMPLE, count)).astype(np.int64)


def _copy(store: Store, wanted: Mapping[int, set[int]]) -> Store:
    """Copy the wanted completions (by index in their group) of each group to a new store."""
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


class Sampled(NamedTuple):
    """A group of a sample, with what a reference gives it, and a model in memory.

    Attributes:
        targets: The tokens of the group.
        logps: The reference's log-probs of tokens, float32 `[S]`; None if it has sums only.
        sums: The reference's sums of the completions, float64 `[N]`.
        now: The model's log-probs of tokens, float32 `[S]`; None without a model.
        what: The record and the reference, for a message.
    """

    targets: TargetTokens
    logps: Tensor | None
    sums: Tensor
    now: Tensor | None
    what: str


def sampled(
    sample: Store,
    layout: str,
    device: torch.device,
    reference: Reference,
    scorer: Scorer | None = None,
    token_budget: int = 1,
) -> Iterator[Sampled]:
    """Score each group of a sample once.

    Args:
        sample: Groups returned by `sample_rows` or `sample_groups`.
        layout: Batch layout: "shared", "tree" or "padded".
        device: Device of the batches.
        reference: The reference.
        scorer: Scores a batch with a model that should be the reference.
        token_budget: Tokens scored at a time; of a sharded model, each pass gathers all weights.

    Raises:
        StaleCacheError: The cache lacks completions of the sample.
    """
    if isinstance(reference, CachedReference | CachedSums):
        reference = reference.over(sample)
    for groups in _packed(sample, layout, token_budget):
        batch = to_torch(lay_out(sample, groups, layout, **shape_for(layout, device)), device)
        targets = batch.targets
        logps = None if isinstance(reference, CachedSums) else reference.logps(batch)
        sums = reference.sums(batch) if logps is None else targets.sums(logps)
        now = scorer(batch) if scorer else None
        for number, place in enumerate(source_names(sample, targets.groups.tolist())):
            part = targets.part(number, number + 1)
            at = part.targets_at
            yield Sampled(
                part.targets,
                None if logps is None else logps[at],
                sums[part.completions],
                None if now is None else now[at],
                f"{place} under the model and {type(reference).__name__}",
            )


def _packed(sample: Store, layout: str, token_budget: int) -> list[np.ndarray]:
    """Return the groups of each batch, which has at most `token_budget` tokens or one group."""
    settings = FeedSettings(
        order="sorted",
        groups_per_update=len(sample),
        token_budget=token_budget,
        layout=layout,
    )
    return micro_batches(settings.plan(sample, 0))


def _gap(stored: Sampled, now: Tensor, bound: Tolerance) -> float:
    """Compare log-probs `now`, float32 `[S]`, with those stored: return the largest difference.

    It is one of tokens, or of sums if only sums are stored, in nats.

    Raises:
        UntrustedReferenceError: A log-prob differs by more than `bound`, or is not finite; the
            message names the record.
    """
    gap = (stored.targets.sums(now) - stored.sums).abs()
    most = bound.of_sums(stored.targets.lengths) + RELATIVE * stored.sums.abs()
    _refuse(gap, most, f"of a completion of {stored.what}")
    if stored.logps is not None:
        gap = (now - stored.logps).abs()
        _refuse(gap, torch.full_like(gap, bound.token), f"of a token of {stored.what}")
    return float(gap.max())


def tolerance(precision: Precision, soft: Collection[str]) -> Tolerance:
    """Return the tolerance for a cache that was filled with different values of `soft` fields."""
    return TOLERANCES[precision, not {"layout", "attention", "device"} & set(soft)]


def _refuse(gap: Tensor, most: Tensor, what: str) -> None:
    if bool((gap <= most).all()):  # False for NaN
        return
    worst = int(torch.where(gap.isnan(), torch.inf, gap - most).argmax())
    raise UntrustedReferenceError(
        f"the log-probs {what} should be equal, but differ by {float(gap[worst]):.3g} nats "
        f"(rounding explains at most {float(most[worst]):.3g}): the reference cannot be trusted"
    )


def conditions(model: nn.Module, layout: str) -> dict[str, str]:
    """Return the soft fields under which this process scores with `model`."""
    inner = transformer(model)
    is_cuda = inner.device.type == "cuda"
    return versions() | {
        "layout": layout,
        "attention": NAME if layout != "padded" else str(inner.config._attn_implementation),
        "device": torch.cuda.get_device_name(inner.device) if is_cuda else inner.device.type,
    }


@torch.no_grad()
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
    """Score a sample of the completions in a cache again, before new ones are added.

    Args:
        model: The loaded reference.
        store: The data.
        reader: Reader of the cache.
        folder: Folder of the cache, with the conditions under which it was filled.
        layout: Batch layout.
        precision: Precision of the model.
        sums: Whether the cache contains sums.

    Returns:
        A note if entries were computed under different soft conditions, else None.

    Raises:
        UntrustedReferenceError: An entry differs from the model's log-prob; the message names the
            record.
        DamagedFingerprintError: The stored fingerprint was altered.
    """
    soft = soft_differences(folder, conditions(model, layout))
    hits = np.flatnonzero(reader.join(store.sum_keys() if sums else store.keys()) >= 0)
    if len(hits) == 0:
        return None
    sample = sample_rows(store, hits)
    stored = (CachedSums if sums else CachedReference)(sample, reader, folder)
    bound = _bound(model, precision, soft)
    device, gap = transformer(model).device, 0.0
    with side_effect_free(model), autocast(precision, device):
        for one in sampled(sample, layout, device, stored, lambda batch: score(model, batch)):
            assert one.now is not None
            gap = max(gap, _gap(one, one.now, bound))
    return _conditions_note(folder, soft, gap, sample)


@torch.no_grad()
def check_start(
    config: TrainConfig,
    store: Store,
    policy: nn.Module,
    reference: Reference,
    layout: str,
    objective: Objective | None,
    stop_ids: Collection[int] = (),
) -> list[str]:
    """Score a sample under the reference, and compare it with an equal model if one is in memory.

    A policy that starts as its reference must equal it before the first update, and the loss must
    have its known initial value. With adapters and a cache, the policy with its adapters disabled
    must equal the reference, also after resuming. Random states are not changed.

    Args:
        config: Settings of the run.
        store: The data.
        policy: The policy, as loaded or as restored from a checkpoint.
        reference: The reference of the run.
        layout: Batch layout of the policy.
        objective: The loss; None after resuming from a checkpoint.
        stop_ids: Tokens that end an answer.

    Returns:
        Notes: if the cache was filled under different soft conditions; if the reference hardly
        ever ends an answer, as a raw base model.

    Raises:
        UntrustedReferenceError: Log-probs, or the loss and its initial value, differ by more than
            rounding can explain.
        DamagedFingerprintError: The stored fingerprint was altered.
    """
    soft, notes = dict[str, str](), list[str | None]()
    if isinstance(reference, CachedReference | CachedSums):
        soft = soft_differences(reference.folder, conditions(policy, layout))
    precision, sample, gap = precision_of(config), sample_groups(store), None
    bound, device = _bound(policy, precision, soft), transformer(policy).device
    scorer = _equal_in_memory(config, policy, is_first=objective is not None)
    first_loss = _InitialLossCheck(config, objective, bound) if objective else None
    ends = EndCheck(stop_ids) if objective else None
    with side_effect_free(policy), autocast(precision, device):
        groups = sampled(sample, layout, device, reference, scorer, training_budget(config))
        for one in groups if scorer or ends else ():
            if ends:
                ends.add(one)
            if one.now is not None:
                gap = max(gap or 0.0, _gap(one, one.now, bound))
                if first_loss:
                    first_loss.check(one.targets, one.targets.sums(one.now), one.sums)
    if isinstance(reference, CachedReference | CachedSums):
        notes.append(_conditions_note(reference.folder, soft, gap, sample))
    if ends:
        notes.append(ends.note())
    return [note for note in notes if note]


RAREST_END = -10.0
"""Mean log-prob of the stop token after chosen answers, below which a reference looks untrained.

Measured with story models of 0.26 and 3.2 million parameters on 200 story pairs: -28.0 and -26.4
as they are; of the smaller one -18.4 after 20 updates of `sft` and -7.4 after 80. The log-probs of
other tokens do not tell these models apart: -1.18, -1.00, -1.16 and -1.04 per token."""
FEWEST_ENDS = 8
"""Answers with a stop token that are needed to judge a reference."""


class EndCheck:
    """Collects how likely the ends of the chosen answers are under the reference.

    Args:
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, stop_ids: Collection[int]) -> None:
        self.stop_ids, self._ends = stop_ids, list[float]()

    def add(self, group: Sampled) -> None:
        """Add a group of the sample, unless its log-probs of tokens are unknown."""
        targets = group.targets
        last = int(targets.completion_offsets[1]) - 1  # of the first completion
        if group.logps is not None and int(targets.target_ids[last]) in self.stop_ids:
            self._ends.append(float(group.logps[last]))

    def note(self) -> str | None:
        """Return a warning if the reference hardly ever ends an answer, as a raw base model."""
        mean = float(np.mean(self._ends)) if len(self._ends) >= FEWEST_ENDS else 0.0
        if mean >= RAREST_END:
            return None
        return (
            f"warning: the reference gives the end of the chosen answers a log-prob of {mean:.1f} "
            "nats on average: it looks like a base model that has not been trained to answer. "
            "Train it with --loss sft first, or choose an instruction-tuned model; if the answers "
            "are texts that were cut off, give --no-eos, so that no end is learned"
        )


def _bound(model: nn.Module, precision: Precision, soft: Collection[str]) -> Tolerance:
    """Return the tolerance; products of 8-bit and 4-bit weights round as coarsely as bf16."""
    is_quantized = getattr(transformer(model), "is_quantized", False)
    return tolerance("bf16" if is_quantized else precision, soft)


def _equal_in_memory(config: TrainConfig, policy: nn.Module, *, is_first: bool) -> Scorer | None:
    """Return a scorer in memory that must equal the reference, or None."""
    if not starts_at_reference(config):
        return None
    if is_first:
        return lambda batch: score(policy, batch)
    # A continued adapter with a cache has no copy of its start in memory.
    return AdapterReference(policy).logps if config.lora and config.cache else None


def _conditions_note(
    folder: Path, soft: dict[str, str], gap: float | None, sample: Store
) -> str | None:
    """Describe the conditions under which a cache was filled, and the result of the check."""
    if not soft:
        return None
    checked = (
        "the reference is not in memory, so no completions were scored again to compare"
        if gap is None
        else f"{sample.completions} completions scored again differ by at most {gap:.2g} nats"
    )
    return f"{folder}: filled under {', '.join(soft.values())}; {checked}"


class _InitialLossCheck:
    """Compares the loss at policy = reference with its known initial value."""

    def __init__(self, config: TrainConfig, objective: Objective, bound: Tolerance) -> None:
        self.expected = objective.initial_value
        self.loss, self.objective, self.bound = config.loss, objective, bound

    def check(self, targets: TargetTokens, now: Tensor, stored: Tensor) -> None:
        """Check the loss, within the change that the tolerance of the log-probs can cause.

        Args:
            targets: The tokens of a group.
            now: Sums under the policy, float64 `[N]`.
            stored: Sums under the reference, float64 `[N]`.

        Raises:
            UntrustedReferenceError: The loss differs by more.
        """
        if self.expected is None:
            return
        shift = self.bound.of_sums(targets.lengths) + RELATIVE * stored.abs()
        with torch.enable_grad():
            start = stored.clone().requires_grad_()
            (slopes,) = torch.autograd.grad(self._losses(targets, start, stored).sum(), start)
        # Twice the first-order change: the slopes themselves change within the tolerance.
        most = 2 * float((slopes.abs() * shift).sum()) + 1e-6 * abs(self.expected)
        gap = (self._losses(targets, now, stored) - self.expected).abs()
        if not bool((gap <= most).all()):
            raise UntrustedReferenceError(
                f"policy and reference are the same model, but the loss {self.loss} starts at "
                f"{self.expected + float(gap.max()):.6g} instead of {self.expected:.6g} (rounding "
                f"explains at most {most:.2g})"
            )

    def _losses(self, targets: TargetTokens, policy: Tensor, reference: Tensor) -> Tensor:
        groups = GroupData(None, None, has_reference=True).groups(targets, policy, reference)
        if self.objective.needs_statistics:
            found = self.objective.statistics(groups.on_host(), trains=False)
            here = {name: value.to(policy.device) for name, value in found.items()}
            groups = replace(groups, statistics=here)
        return self.objective.losses(groups)


def starts_at_reference(config: TrainConfig) -> bool:
    """Return whether the policy equals the reference before its first update."""
    if not needs_reference(config) or config.study_uniform_reference:
        return False
    if config.reference is None:
        return True
    start = model_fingerprint(config.model, precision_of(config), config.quantization)
    return start.digest == reference_fingerprint(config).digest
