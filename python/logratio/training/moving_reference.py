"""A reference that follows the policy: TR-DPO, and moving averages of the policy."""

from typing import Any

import torch
from torch import Tensor, nn

from logratio.training.parallel.strategy import keep_own_shards
from logratio.training.reference import FrozenReference


class MovingReference(FrozenReference):
    r"""A second model in memory that is mixed with the policy from time to time.

    Every :math:`\tau` updates, :math:`\theta_\mathrm{ref} \leftarrow \alpha\,\theta +
    (1 - \alpha)\,\theta_\mathrm{ref}`, Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656, eq. 7 and
    8). :math:`\alpha = 1` replaces the reference (the hard update); :math:`\tau = 1` with a small
    :math:`\alpha` is an exponential moving average.

    Args:
        model: The reference at the start.
        every: Updates between two changes, :math:`\tau`.
        share: Share of the policy in the mixture, :math:`\alpha`, in (0, 1].
    """

    def __init__(self, model: nn.Module, every: int, share: float) -> None:
        super().__init__(model)
        self.every, self.share = every, share

    @torch.no_grad()
    def follow(self, policy: nn.Module, step: int) -> None:
        """Mix the policy in, if it is time after update `step`."""
        if step % self.every:
            return
        for model in (self.model, policy):
            keep_own_shards(model)
        own = dict(self.model.named_parameters())
        for name, parameter in policy.named_parameters():
            own[name].lerp_(parameter.to(own[name].dtype), self.share)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, for checkpoints."""
        keep_own_shards(self.model)
        return {f"reference.{name}": p.detach() for name, p in self.model.named_parameters()}


def moving(reference: Any) -> MovingReference | None:
    """Return a reference if it follows the policy, else None."""
    return reference if isinstance(reference, MovingReference) else None
