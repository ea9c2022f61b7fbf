"""Attention of long runs of tokens in parts, so that memory grows with the length, not its square.

A mask of T queries and T keys takes 4 T² bytes, 69 GB for 128k tokens, and attention with a cap or
sinks also stores its scores. Here the queries of a run are split into parts. A part attends to the
keys that it can see, with its own mask, and neither masks nor scores are kept: the backward
pass computes them again, part by part. With a window, keys outside of it are not read, so that the
work is linear in the length too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Spans = tuple[tuple[int, int], ...]
"""Spans of tokens, each as (start, stop)."""

MASK_CELLS = 2**24
"""Calls whose mask has more cells than this are computed in parts. In float32 it takes 64 MiB."""
PART_CELLS = 2**24
"""Number of cells of a part's mask, or of its scores if they are stored (rounded up)."""
LEAST_ROWS = 16
"""Smallest number of queries of a part; fewer would read all keys for little work."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of queries `[1, H, Lq, D]` to keys and values `[1, Hk, Lk, D]` with a mask that is
added to the scores, `[1, 1, Lq, Lk]`, and with the sinks of `attend_in_parts`."""


class Run(NamedTuple):
    """Consecutive tokens of a sequence, each of which sees the tokens before it.

    Attributes:
        start: First token.
        stop: Token after the last one.
        path: Spans of the tokens that precede the run in its sequence, in order.
    """

    start: int
    stop: int
    path: Spans = ()


class Part(NamedTuple):
    """Consecutive queries of a run, and the keys that they see: the last keys are their own.

    Attributes:
        start: First query.
        stop: Query after the last one.
        keys: Spans of the keys, in the order of their positions.
    """

    start: int
    stop: int
    keys: Spans

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.stop - self.start, sum(stop - start for start, stop in self.keys)


def parts_of(runs: Sequence[Run], window: int | None, stored_heads: int = 1) -> Iterator[Part]:
    """Split runs into parts.

    Args:
        runs: Runs of tokens.
        window: A token sees itself and the `window - 1` tokens before it; None: all before it.
        stored_heads: Number of heads whose scores are stored at a time.
    """
    for start, stop, path in runs:
        longest = stop - start + sum(b - a for a, b in path)
        reach = longest if window is None else min(longest, 2 * window)
        rows = max(LEAST_ROWS, PART_CELLS // (reach * stored_heads))
        rows = rows if window is None else min(rows, max(LEAST_ROWS, window))
        for first in range(start, stop, rows):
            last = min(first + rows, stop)
            seen = (*path, (start, last))
            if window is not None:
                seen = _last(seen, last - first + window - 1)
            yield Part(first, last, seen)


def _last(spans: Spans, count: int) -> Spans:
    """Return the last `count` tokens of spans, or all if there are fewer."""
    kept: list[tuple[int, int]] = []
    for start, stop in reversed(spans):
        if count <= 0:
            break
        kept.append((max(start, stop - count), stop))
        count -= stop - start
    return tuple(reversed(kept))


def part_mask(part: Part, window: int | None, like: Tensor) -> Tensor:
    """Return 0 where a query sees a key and -inf elsewhere, `[1, 1, Lq, Lk]`, as `like`.

    Queries and keys have consecutive positions that end with the same token.
    """
    queries, keys = part.shape
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
    hidden = hidden.triu_(keys - queries + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril_(keys - queries - window)
    mask = torch.zeros(queries, keys, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, -torch.inf)[None, None]


def attend_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[Run],
    attend: Attend,
    *,
    window: int | None = None,
    stored_heads: int = 1,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend within runs: queries `[1, H, Q, D]` to `[1, H, Q, Dv]`.

    Args:
        query: Queries of the runs, which follow one another.
        key: Keys of the tokens that runs and paths refer to, `[1, Hk, T, D]`.
        value: Their values, `[1, Hk, T, Dv]`.
        runs: Runs of tokens; the first query is that of token `runs[0].start`.
        attend: Computes a part. The backward pass calls it again, with the same random state.
        window: A token sees itself and the `window - 1` tokens before it; None: all before it.
        stored_heads: Number of heads whose scores `attend` stores at a time.
        sinks: Attention sinks `[H]`, which `attend` gets too, or None.
    """
    parts = list(parts_of(runs, window, stored_heads))
    out = _InParts.apply(query, key, value, sinks, parts, attend, window, runs[0].start)
    return cast(Tensor, out)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        parts: list[Part],
        attend: Attend,
        window: int | None,
        offset: int,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.given, ctx.random = (parts, attend, window, offset), _random_states(query.device)
        out = []
        for part in parts:
            mine = query[:, :, part.start - offset : part.stop - offset]
            states = _gathered(key, part.keys), _gathered(value, part.keys)
            out.append(attend(mine, *states, part_mask(part, window, query), sinks))
        return torch.cat(out, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        parts, attend, window, offset = ctx.given
        wide = torch.promote_types(query.dtype, torch.float32)
        totals = [torch.zeros_like(x, dtype=wide) for x in (key, value)]
        of_query, of_sinks = torch.empty_like(query), None
        extra = [] if sinks is None else [sinks]
        with _random_state(ctx.random, query.device):
            for part in parts:
                rows = slice(part.start - offset, part.stop - offset)
                states = query[:, :, rows], _gathered(key, part.keys), _gathered(value, part.keys)
                leaves = [x.detach().requires_grad_() for x in (*states, *extra)]
                mask = part_mask(part, window, query)
                with torch.enable_grad():
                    out = attend(*leaves[:3], mask, *(leaves[3:] or [None]))
                found = torch.autograd.grad(out, leaves, gradient[:, :, rows])
                of_query[:, :, rows] = found[0]
                for total, own in zip(totals, found[1:3], strict=True):
                    _add(total, own, part.keys)
                if extra:
                    of_sinks = found[3] if of_sinks is None else of_sinks + found[3]
        return of_query, totals[0].to(key.dtype), totals[1].to(value.dtype), of_sinks, *[None] * 4


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


@contextmanager
def _random_state(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Set the generators to earlier states inside the block."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(states[0])
        if devices:
            torch.cuda.set_rng_state(states[1], device)
        yield


def _gathered(states: Tensor, spans: Spans) -> Tensor:
    """Return the tokens of spans: `[1, H, T, D]` to `[1, H, Lk, D]`, without a copy of one span."""
    found = [states[:, :, start:stop] for start, stop in spans]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _add(total: Tensor, gradient: Tensor, spans: Spans) -> None:
    """Add the gradients of gathered tokens `[1, H, Lk, D]` to those of all tokens, in place."""
    at = 0
    for start, stop in spans:
        total[:, :, start:stop] += gradient[:, :, at : at + stop - start]
        at += stop - start
