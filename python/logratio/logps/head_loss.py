r"""A loss of log-probs and its gradients with one product of the head per tile and direction.

The gradient of a token's log-prob is known up to one factor,
:math:`\partial L / \partial \log p_t`, and a pair's loss gives it as soon as the pair is scored.
So whole groups are taken as long as they fit in a tile, their loss and its factors are made while
their logits are there, and the logits turn into gradients at once: 6 V H FLOPs a target instead of
8, and nothing kept for the backward pass.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.head import Head
from logratio.logps.head_logps import HeadGradients, product_dtype
from logratio.logps.tensors import Part
from logratio.logps.tiles import Tile, tile_rows

LossOf = Callable[[Tensor, Part], Tensor]
"""From the log-probs, float32 `[s]`, of a part of a batch to its share of the loss, a scalar."""


def head_loss(
    head: Head, hidden: Tensor, target_ids: Tensor, parts: list[Part], loss_of: LossOf
) -> Tensor:
    """Add up `loss_of` over the parts of a batch, from `hidden`, `[S, H]`: a scalar."""
    loss: Tensor = _HeadLoss.apply(hidden, head.weight, head.bias, target_ids, head, parts, loss_of)
    return loss


class _HeadLoss(torch.autograd.Function):
    """See `head_loss`; its gradients are complete when its forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        head: Head,
        parts: list[Part],
        loss_of: LossOf,
    ) -> Tensor:
        sums, losses = HeadGradients(head, hidden, product_dtype(hidden)), []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                losses.append(_add_part(sums, target_ids, part, loss_of, tile_rows(head)))
        ctx.gradients = sums.result()
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        own = [None if g is None else _scaled(g, factor) for g in ctx.gradients]
        del ctx.gradients
        return *own, None, None, None, None


@cache
def unit(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a loss by itself, 1: always the same tensor.

    `loss.backward(unit(...))` says to `head_loss` that nothing is to be scaled, without a look at
    the value, for which the host would wait.
    """
    return torch.ones((), device=device, dtype=dtype)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply by the gradient of the loss itself: where it is known to be 1, nothing is to do."""
    is_known = factor is unit(factor.device, factor.dtype)
    if is_known or (factor.device.type == "cpu" and float(factor) == 1.0):
        return gradient
    return gradient * factor.to(gradient.dtype)


def _add_part(
    sums: HeadGradients, target_ids: Tensor, part: Part, loss_of: LossOf, rows: int
) -> Tensor:
    """Score a part, make its loss, and add the gradients; return the loss."""
    start, stop = part.targets_at.start, part.targets_at.stop
    if stop - start <= rows:
        with Tile(sums.matrix, sums.low[start:stop], target_ids[start:stop]) as tile:
            loss, factors = _loss_and_factors(tile.logps, part, loss_of)
            sums.add(start, tile, factors)
        return loss
    starts = range(start, stop, rows)  # one group is larger than a tile: its tiles are made twice
    tiles = [slice(at, min(at + rows, stop)) for at in starts]
    logps = []
    for at in tiles:
        with Tile(sums.matrix, sums.low[at], target_ids[at]) as tile:
            logps.append(tile.logps)
    loss, factors = _loss_and_factors(torch.cat(logps), part, loss_of)
    for at, g in zip(tiles, factors.split(rows), strict=True):
        with Tile(sums.matrix, sums.low[at], target_ids[at]) as tile:
            sums.add(at.start, tile, g)
    return loss


def _loss_and_factors(logps: Tensor, part: Part, loss_of: LossOf) -> tuple[Tensor, Tensor]:
    """Return a part's loss, and its derivative by each log-prob, float32 `[s]`."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss = loss_of(leaf, part)
        (factors,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), factors
