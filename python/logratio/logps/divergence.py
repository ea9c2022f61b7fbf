"""Divergences between the token distributions of two models, together with log-probs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from logratio.logps.attention.interface import shared_prompts
from logratio.logps.batch import Batch, PaddedBatch
from logratio.logps.completion import target_states, transformer
from logratio.logps.head import TILE_ELEMENTS, head_logits
from logratio.logps.head_loss import LossOf


@dataclass(frozen=True)
class LiveModel:
    """A model in memory whose distributions are compared with those of the policy.

    Attributes:
        model: The model, or the policy itself.
        active: Returns a context in which `model` computes as the reference.
    """

    model: nn.Module
    active: Callable[[], AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Return the hidden states that predict the targets of a batch, `[S, H]`."""
        inner = transformer(self.model)
        sharing = nullcontext() if isinstance(batch, PaddedBatch) else shared_prompts(inner)
        with self.active(), sharing:
            return target_states(inner, batch)

    @torch.no_grad()
    def log_distributions(self, states: Tensor) -> Tensor:
        """Return log-probs of the whole vocabulary, float32 or wider `[n, V]`."""
        with self.active():
            return _log_distributions(self.model, states)


COPIES = 8
"""Arrays of a tile's size that its backward pass holds: logits, log-probs and probabilities of both
models, and gradients. Together they take the memory of one tile of `head`."""


def divergence_loss(model: nn.Module, batch: Batch, loss_of: LossOf, other: LiveModel) -> Tensor:
    """Compute a loss of log-probs and of divergences of `model` from `other`.

    Tiles of logits are recomputed in the backward pass, for both models, so that no whole logits
    are kept: `V` times the positions of one tile.

    Args:
        model: The policy, as in `completion_logps`.
        batch: A batch in any layout that both models take.
        loss_of: Maps log-probs, float32 `[S]`, and the whole batch as one part, whose `divergences`
            are KL(other ‖ model) at each target, to a scalar. It is called once.
        other: The other model.

    Returns:
        The loss, a scalar; differentiable.
    """
    theirs = other.states(batch)
    states, targets = target_states(transformer(model), batch), batch.targets
    width = model.config.get_text_config().vocab_size  # type: ignore[operator,union-attr]
    rows = max(1, TILE_ELEMENTS // (COPIES * width))
    tiles = zip(states.split(rows), theirs.split(rows), targets.target_ids.split(rows), strict=True)
    found = [checkpoint(_tile, model, other, *tile, use_reentrant=False) for tile in tiles]
    logps, divergences = (torch.cat(column) for column in zip(*found, strict=True))
    return loss_of(logps, replace(targets.whole, divergences=divergences))


def _tile(
    model: nn.Module, other: LiveModel, states: Tensor, theirs: Tensor, target_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of targets and KL(other ‖ model), `[n]` each."""
    own, reference = _log_distributions(model, states), other.log_distributions(theirs)
    divergence = (reference.exp() * (reference - own)).sum(1)
    return own.gather(1, target_ids[:, None])[:, 0], divergence


def _log_distributions(model: nn.Module, states: Tensor) -> Tensor:
    logits = head_logits(transformer(model), states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
