"""Compute log-probs and losses from hidden states, one tile of logits at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.batch import Part
from logratio.logps.head import Head, Tile, tile_rows


def head_logps(head: Head, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """Score `target_ids`, int64 `[S]`, from `hidden`, `[S, H]`: float32 `[S]`, in nats.

    For a trained head, logits are recomputed in the backward pass, when the gradient of the loss is
    known. For a frozen head (LoRA), the gradient of each position is computed in the forward pass.
    """
    scored: Tensor = _HeadLogps.apply(hidden, head.weight, head.bias, target_ids, head)
    return scored


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: autocast's if it is enabled, else that of `hidden`."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _HeadLogps(torch.autograd.Function):
    """See `head_logps`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        head: Head,
    ) -> Tensor:
        dtype = product_dtype(hidden)
        ctx.head, ctx.dtype, rows = head, dtype, tile_rows(head)
        ctx.is_frozen = ctx.needs_input_grad[0] and not head.is_trained
        logps, slopes = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            low, matrix = hidden.to(dtype), head.cast(dtype)
            for h, t in zip(low.split(rows), target_ids.split(rows), strict=True):
                with Tile(matrix, h, t) as tile:
                    logps.append(tile.logps)
                    if ctx.is_frozen:
                        slopes.append(tile.hidden_gradient())
        ctx.save_for_backward(hidden, target_ids, *([torch.cat(slopes)] if slopes else []))
        return torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, target_ids, *slopes = ctx.saved_tensors
        if ctx.is_frozen:
            return (slopes[0] * gradient[:, None]).to(hidden.dtype), None, None, None, None
        sums, rows = HeadGradients(ctx.head, hidden, ctx.dtype), tile_rows(ctx.head)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                at = slice(start, start + rows)
                with Tile(sums.matrix, sums.low[at], target_ids[at]) as tile:
                    sums.add(start, tile, gradient[at])
        return *sums.result(), None, None


class HeadGradients:
    """Accumulates the gradients of a trained head and of its hidden states, tile by tile."""

    def __init__(self, head: Head, hidden: Tensor, dtype: torch.dtype) -> None:
        """Start at zero; products are in `dtype`, sums over tiles in float32 or wider."""
        self._head, self._dtype = head, hidden.dtype
        self.low, self.matrix = hidden.to(dtype), head.cast(dtype)
        self._hidden = torch.empty_like(self.low)
        self._weight, self._bias = _zeros(head.weight), _zeros(head.bias)

    def add(self, start: int, tile: Tile, gradient: Tensor) -> None:
        """Add the gradients of the tile that starts at position `start`."""
        self._hidden[start : start + len(gradient)] = tile.hidden_gradient(gradient)
        tile.add_head_gradient(gradient, self._weight, self._bias)

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of hidden states, weight and bias, in the dtypes of these."""
        weight = None if self._weight is None else self._weight.to(self._head.weight.dtype)
        bias = self._bias
        if bias is not None and self._head.bias is not None:
            bias = bias.to(self._head.bias.dtype)
        return self._hidden.to(self._dtype), weight, bias


def _zeros(parameter: Tensor | None) -> Tensor | None:
    """Return zeros for a parameter's gradient, or None if it is not trained."""
    if parameter is None or not parameter.requires_grad:
        return None
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


LossOf = Callable[[Tensor, Part], Tensor]
"""Maps the log-probs of a part of a batch, float32 `[s]`, to its share of the loss, a scalar."""


def head_loss(
    head: Head,
    hidden: Tensor,
    target_ids: Tensor,
    parts: list[Part],
    loss_of: LossOf,
    *,
    collisions: bool = False,
) -> Tensor:
    """Return the sum of `loss_of` over the parts of a batch, a scalar, from `hidden`, `[S, H]`.

    With `collisions`, the parts have theirs: see `Part`.
    """
    loss: Tensor = _HeadLoss.apply(
        hidden, head.weight, head.bias, target_ids, head, parts, loss_of, collisions
    )
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
        collisions: bool,
    ) -> Tensor:
        sums = HeadGradients(head, hidden, product_dtype(hidden))
        scoring = _Scoring(sums, target_ids, loss_of, tile_rows(head), collisions)
        with torch.autocast(hidden.device.type, enabled=False):
            losses = [scoring.add(part) for part in parts]
        ctx.gradients = sums.result()
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        own = [None if g is None else _scaled(g, factor) for g in ctx.gradients]
        del ctx.gradients
        return *own, None, None, None, None, None


@cache
def unit_gradient(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a scalar tensor of 1; always the same object for a device and dtype.

    With `loss.backward(unit_gradient(...))`, `head_loss` recognises the object and does not scale
    its gradients, without reading the value from the device.
    """
    return torch.ones((), device=device, dtype=dtype)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient by the incoming gradient of the loss, unless it is known to be 1."""
    is_known = factor is unit_gradient(factor.device, factor.dtype)
    if is_known or (factor.device.type == "cpu" and float(factor) == 1.0):
        return gradient
    return gradient * factor.to(gradient.dtype)


@dataclass(frozen=True)
class _Scoring:
    """Scores the parts of a batch, and adds their gradients to `sums`."""

    sums: HeadGradients
    target_ids: Tensor
    loss_of: LossOf
    rows: int
    collisions: bool

    def add(self, part: Part) -> Tensor:
        """Score a part, compute its loss and accumulate its gradients; return the loss."""
        at = part.targets_at
        if at.stop - at.start <= self.rows:
            with self._tile(at) as tile:
                part = replace(part, collisions=tile.collisions)
                loss, factors = _loss_and_factors(tile.logps, part, self.loss_of)
                self.sums.add(at.start, tile, factors)
            return loss
        return self._add_large(part)

    def _add_large(self, part: Part) -> Tensor:
        """Add a group that is larger than a tile: its tiles are computed twice."""
        start, stop = part.targets_at.start, part.targets_at.stop
        places = [slice(at, min(at + self.rows, stop)) for at in range(start, stop, self.rows)]
        logps, collisions = [], []
        for at in places:
            with self._tile(at) as tile:
                logps.append(tile.logps)
                if tile.collisions is not None:
                    collisions.append(tile.collisions)
        if collisions:
            part = replace(part, collisions=torch.cat(collisions))
        loss, factors = _loss_and_factors(torch.cat(logps), part, self.loss_of)
        for at, own in zip(places, factors.split(self.rows), strict=True):
            with self._tile(at) as tile:
                self.sums.add(at.start, tile, own)
        return loss

    def _tile(self, at: slice) -> Tile:
        sums = self.sums
        return Tile(sums.matrix, sums.low[at], self.target_ids[at], collisions=self.collisions)


def _loss_and_factors(logps: Tensor, part: Part, loss_of: LossOf) -> tuple[Tensor, Tensor]:
    """Return a part's loss, and its derivative with respect to each log-prob, float32 `[s]`."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss = loss_of(leaf, part)
        (factors,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), factors
