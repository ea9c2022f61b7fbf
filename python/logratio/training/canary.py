"""Sampled completions are scored again and compared, wherever the reference is in memory anyway.

This catches what a fingerprint cannot know: a kernel or a library that computes something else, a
fault of the machine that filled the cache, a mistake of ours.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logratio._rust import Store, StoreWriter
from logratio.data import lay_out, source_names
from logratio.errors import LogratioError
from logratio.logps.tensors import Batch, shape_for, to_torch
from logratio.training.cached import CachedReference, CachedSums
from logratio.training.config import Precision
from logratio.training.reference import Reference

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
