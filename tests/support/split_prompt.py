"""Attention to a prompt that ranks share: the design in `prompt_over_gpus.md`, and a dense call.

Each rank has two chunks of the prompt, `rank` and `2 * ranks - 1 - rank`, and some whole
completions. Calls are torch's FlashAttention for CPUs, through the interface of `flash.Flash`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from logratio.logps.attention.flash import Flash, _merge
from logratio.logps.sequences import Bounds
from logratio.training.parallel.processes import join_processes

HEADS, KEY_HEADS, SIZE = 4, 2, 8
States = tuple[Tensor, Tensor, Tensor]
Call = tuple[slice, slice, bool, bool]
"""Queries and keys of the rank; whether the keys are of the prompt, and whether it is causal."""


def inputs(prompt: int, completions: Sequence[int]) -> tuple[States, Tensor]:
    """Return queries, keys and values of the prompt and the completions, and a gradient."""
    torch.manual_seed(17)
    tokens = prompt + sum(completions)
    query, key, value, gradient = (
        torch.randn(tokens, heads, SIZE, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    return (query, key, value), gradient


def dense(prompt: int, completions: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of queries, keys and values, of one call by a mask."""
    (query, key, value), gradient = inputs(prompt, completions)
    states = [one.transpose(0, 1).requires_grad_() for one in (query, key, value)]
    owners = [-1] * prompt
    for number, length in enumerate(completions):
        owners += [number] * length
    owner = torch.tensor(owners)
    seen = ((owner[:, None] == owner) | (owner == -1)).tril()
    q, k, v = states
    out = scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(0, 1)
    return out.detach(), *(g.transpose(0, 1) for g in torch.autograd.grad(out, states, gradient))


def _on_heads(*tokens: Tensor) -> list[Tensor]:
    return [one.transpose(0, 1)[None] for one in tokens]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, _bounds: Bounds, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_on_heads(query, key, value), 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1).contiguous(), lse[0]


def _backward(
    gradient: Tensor,
    states: States,
    out: Tensor,
    lse: Tensor,
    _bounds: Bounds,
    causal: bool,
    scale: float | None,
) -> States:
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_on_heads(gradient, *states, out), lse[None], 0.0, causal, scale=scale
    )
    query, key, value = (one[0].transpose(0, 1) for one in found)
    return query, key, value


CPU = Flash(_forward, _backward)
"""One sequence a call."""


class Shares:
    """What each rank has of a prompt and its completions.

    Args:
        prompt: Length of the prompt; twice the number of ranks divides it.
        completions: Lengths of the completions.
        rank: The rank.
        ranks: Number of ranks.
    """

    def __init__(self, prompt: int, completions: Sequence[int], rank: int, ranks: int) -> None:
        self.chunk, rest = divmod(prompt, 2 * ranks)
        assert not rest
        self.chunks = rank, 2 * ranks - 1 - rank
        starts = [prompt + sum(completions[:n]) for n in range(len(completions))]
        own = [*zip(starts, completions, strict=True)][rank::ranks]
        self.lengths = [length for _, length in own]
        parts = [*((self.chunk * n, self.chunk) for n in self.chunks), *own]
        self.tokens = torch.cat([torch.arange(at, at + length) for at, length in parts])
        pairs = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
        # The places of the prompt's chunks among those of all ranks.
        self.order = torch.tensor([n for pair in pairs for n in pair]).argsort()
        self.prompt = prompt

    def calls(self) -> Iterator[Call]:
        """Yield the calls of the design; that of a part to itself comes first."""
        for place, number in enumerate(self.chunks):
            queries = slice(place * self.chunk, (place + 1) * self.chunk)
            yield queries, queries, False, True
            yield queries, slice(0, number * self.chunk), True, False
        at = 2 * self.chunk
        for length in self.lengths:
            queries = slice(at, at + length)
            yield queries, queries, False, True
            yield queries, slice(0, self.prompt), True, False
            at += length

    def gathered(self, chunks: Tensor) -> Tensor:
        """Return the whole prompt's keys or values."""
        ranks = self.prompt // (2 * self.chunk)
        found = [torch.empty_like(chunks) for _ in range(ranks)]
        dist.all_gather(found, chunks.contiguous())
        parts = torch.cat(found).unflatten(0, (-1, self.chunk))
        prompt: Tensor = parts[self.order].flatten(0, 1)
        return prompt

    def scattered(self, prompt: Tensor) -> Tensor:
        """Return the sum over ranks of this rank's chunks."""
        parts = prompt.unflatten(0, (-1, self.chunk))[self.order.argsort()].flatten(0, 1)
        found = torch.empty_like(parts[: 2 * self.chunk])
        dist.reduce_scatter_tensor(found, parts.contiguous())
        return found


def attend(shares: Shares, states: States, flash: Flash) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of a rank's tokens."""
    query, key, value = states
    own = 2 * shares.chunk
    prompt = shares.gathered(key[:own]), shares.gathered(value[:own])
    out, lse = torch.empty_like(query), query.new_empty(HEADS, len(query))
    for queries, keys, shared, causal in shares.calls():
        if keys.stop == keys.start:
            continue
        k, v = (one[keys] for one in (prompt if shared else (key, value)))
        found = flash.forward(query[queries], k, v, bounds(queries, keys), causal, None)
        if shared:
            found = _merge((out[queries], lse[:, queries]), found)
        out[queries], lse[:, queries] = found
    return out, lse


def gradients(
    shares: Shares, states: States, out: Tensor, lse: Tensor, gradient: Tensor, flash: Flash
) -> States:
    """Return the gradients of a rank's queries, keys and values, given those of its output."""
    query, key, value = states
    own = 2 * shares.chunk
    prompt = shares.gathered(key[:own]), shares.gathered(value[:own])
    of_query, *mine = (torch.zeros_like(one) for one in states)
    theirs = [torch.zeros_like(one) for one in prompt]
    for queries, keys, shared, causal in shares.calls():
        if keys.stop == keys.start:
            continue
        k, v = (one[keys] for one in (prompt if shared else (key, value)))
        given = query[queries], k, v
        whole = out[queries], lse[:, queries]
        parts = flash.backward(
            gradient[queries], given, *whole, bounds(queries, keys), causal, None
        )
        of_query[queries] += parts[0]
        for total, part in zip(theirs if shared else mine, parts[1:], strict=True):
            total[keys] += part
    for total, part in zip(mine, theirs, strict=True):
        total[:own] += shares.scattered(part)
    return of_query, *mine  # type: ignore[return-value]


def bounds(queries: slice, keys: slice) -> Bounds:
    """Return the bounds of a call of one sequence."""
    lengths = queries.stop - queries.start, keys.stop - keys.start
    first, second = (torch.tensor([0, length], dtype=torch.int32) for length in lengths)
    return Bounds(first, second, *lengths)


def attend_split(prompt: int, completions: Sequence[int], file: str) -> None:
    """Attend as one rank of several; write its tokens, their output and the gradients."""
    processes = join_processes()
    processes.start_group(torch.device("cpu"), even_alone=True)
    shares = Shares(prompt, completions, processes.rank, processes.count)
    states, gradient = inputs(prompt, completions)
    own: Any = tuple(one[shares.tokens] for one in states)
    out, lse = attend(shares, own, CPU)
    found = gradients(shares, own, out, lse, gradient[shares.tokens], CPU)
    named = dict(zip("oqkv", (out, *found), strict=True)) | {"tokens": shares.tokens}
    save_file({name: one.contiguous() for name, one in named.items()}, f"{file}.{processes.rank}")
