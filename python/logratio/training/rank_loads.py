"""What each rank computes in an update, by the planner that will share out the real run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from logratio._rust import Store
from logratio.data.feed import FeedSettings, micro_batches
from logratio.data.store.load import datasets_of
from logratio.errors import ConfigError
from logratio.logps.batch import shape_for
from logratio.training.config import TrainConfig
from logratio.training.models import training_budget

UPDATES = 32
"""Number of updates that a forecast looks at, spread evenly over an epoch."""
PLANNED = 128
"""Number of updates that are planned; of more data, a random part is planned."""


@dataclass(frozen=True)
class Load:
    """The work of one micro-batch.

    Attributes:
        tokens: Tokens computed, with the padding of rows.
        targets: Tokens of completions, where logits are computed.
        pairs: Pairs of tokens of which one attends to the other.
        groups: Groups: pairs of preferences, or demonstrations.
    """

    tokens: float = 0.0
    targets: float = 0.0
    pairs: float = 0.0
    groups: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.tokens + other.tokens,
            self.targets + other.targets,
            self.pairs + other.pairs,
            self.groups + other.groups,
        )


Lengths = Sequence[Sequence[int]]
"""Groups: tokens of the prompt, then of each completion."""
RankLoads = Sequence[Sequence[Load]]
"""The micro-batches of one update: per rank, in order."""


def load_of(groups: Lengths, multiple_of: int = 1) -> Load:
    """Return the work of a micro-batch with groups of these lengths, prompts computed once."""
    tokens = sum(map(sum, groups))
    return Load(
        tokens=float(-(-tokens // multiple_of) * multiple_of),
        targets=float(sum(sum(completions) for _, *completions in groups)),
        pairs=sum(_pairs(prompt, completions) for prompt, *completions in groups),
        groups=len(groups),
    )


def _pairs(prompt: int, completions: Sequence[int]) -> float:
    """Return the pairs of tokens that attend: each to itself and to those before it."""
    own = sum(length * (length + 1) / 2 + length * prompt for length in completions)
    return prompt * (prompt + 1) / 2 + own


class _Groups:
    """The work of the groups of a store, as columns."""

    def __init__(self, store: Store, multiple_of: int) -> None:
        prompts = store.prompt_lengths().astype(np.float64)
        lengths = store.completion_lengths().astype(np.float64)
        starts = store.completion_offsets()[:-1]
        sizes = np.diff(store.completion_offsets())
        own = lengths * (lengths + 1) / 2 + lengths * np.repeat(prompts, sizes)
        self._tokens = store.shared_lengths().astype(np.float64)
        self._targets = np.add.reduceat(lengths, starts)
        self._pairs = prompts * (prompts + 1) / 2 + np.add.reduceat(own, starts)
        self._multiple = multiple_of

    def load(self, groups: NDArray[np.int64]) -> Load:
        """Return the work of a micro-batch with these groups."""
        tokens = float(self._tokens[groups].sum())
        padded = -(-tokens // self._multiple) * self._multiple
        targets, pairs = float(self._targets[groups].sum()), float(self._pairs[groups].sum())
        return Load(padded, targets, pairs, len(groups))


def rank_loads(
    config: TrainConfig, store: Store, world_size: int, device: torch.device
) -> list[RankLoads]:
    """Return the micro-batches of each rank in some updates of an epoch.

    Args:
        config: Settings of the run.
        store: The groups to train on.
        world_size: Number of ranks.
        device: The kind of device, which determines the padding of rows.

    Returns:
        Up to `UPDATES` updates. Only full ones, if there are any.

    Raises:
        ConfigError: An update has fewer groups than ranks.
    """
    per_update = min(config.batch_size, len(store))
    if per_update < world_size:
        few = config.batch_size < world_size
        which = f"batch_size {config.batch_size:,}" if few else f"data of {len(store):,} groups"
        remedy = f"a batch_size of {world_size:,} or more" if few else "more data"
        raise ConfigError(
            f"{which} for {world_size:,} GPUs: some would have nothing to do in an update. Give "
            f"{remedy}, or plan fewer GPUs"
        )
    store = _part(store, PLANNED * config.batch_size, config.seed)
    shape = shape_for("shared", device)
    settings = FeedSettings(
        groups_per_update=config.batch_size,
        token_budget=training_budget(config),
        seed=config.seed,
        weights=config.mix,
        datasets=datasets_of(store) if config.mix else None,
    )
    groups = _Groups(store, shape["multiple_of"])
    plans = [settings.plan(store, 0, rank, world_size) for rank in range(world_size)]
    updates = max(1, len(store) // config.batch_size)
    updates = min(updates, len(plans[0].update_offsets) - 1)
    chosen = np.unique(np.linspace(0, updates - 1, min(UPDATES, updates)).round().astype(int))
    return [
        [[groups.load(micro) for micro in micro_batches(plan, int(update))] for plan in plans]
        for update in chosen
    ]


def _part(store: Store, most: int, seed: int) -> Store:
    """Return at most `most` groups of a store, chosen at random."""
    if len(store) <= most:
        return store
    keep = np.zeros(len(store), bool)
    keep[np.random.default_rng(seed).choice(len(store), most, replace=False)] = True
    return store.select(keep, None, store.metadata)


def total(loads: Sequence[Load]) -> Load:
    """Return the sum of loads."""
    return sum(loads, Load())
