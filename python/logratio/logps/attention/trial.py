"""Whether a kernel works here: on this GPU, with these versions, for these heads.

Which GPUs and head sizes a kernel takes is nowhere written whole, and a compiled one fails only
when it is called. So each is tried before its first use, forward and backward, and what fails is
passed over for the next with the reason told, instead of ending a run.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from logratio.logps.attention.kernels import Kernel, Wanted
from logratio.logps.attention.one_call import attend_in_one_call
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.sequences import Sequences

GROUPS = ((70, (60, 40)), (30, (50, 20)))
"""Lengths of prompts and completions: together more than a kernel's largest tile, of 128."""
TOLERANCE = 0.05
"""Of the norm: far above the rounding of bfloat16, far below a mask that is wrong."""
WINDOW = 37
"""Tokens of the window that is tried where a layer has one: it ends inside prompts, inside
completions and between the two, and is no multiple of a tile. One more or less moves values and
gradients by a tenth of their norm: twice the tolerance."""


@cache
def failure(kernel: Kernel, wanted: Wanted, device: torch.device) -> str | None:
    """Say why a kernel does not do what is wanted, or return None; tried once in a process.

    Raises:
        torch.OutOfMemoryError: there is no memory for a few hundred tokens.
    """
    # A thread of its own has no autocast, no_grad, checkpoint or hook of the caller's.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_failure, kernel, wanted, device).result()


def _failure(kernel: Kernel, wanted: Wanted, device: torch.device) -> str | None:
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            worst = _worst_gap(kernel, wanted, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and launchers have errors of many types
        reason = (str(error).splitlines() or [""])[0]
        return f"it fails here: {type(error).__name__}: {reason[:200]}"
    return None if worst <= TOLERANCE else f"its numbers are wrong here, by {worst:.2g}"


def _worst_gap(kernel: Kernel, wanted: Wanted, device: torch.device) -> float:
    """Return how far values or gradients are from attention's definition, relative to its norm."""
    row, states = row_of(GROUPS, device), _states(wanted, device)
    query, key, value = states
    scoring = Scoring(softcap=wanted.softcap, window=WINDOW if wanted.windowed else None)
    out = attend_in_one_call(kernel, query, key, value, row, scoring)
    truth = _by_definition(states, row, wanted.softcap, scoring.window)
    upstream = torch.linspace(-1, 1, out.numel(), device=device).reshape(out.shape)
    found = torch.autograd.grad(out, states, upstream.to(out.dtype))
    expected = torch.autograd.grad(truth, states, upstream.double())
    pairs = zip((out.detach(), *found), (truth.detach(), *expected), strict=True)
    gaps = [float((one.double() - other).norm() / other.norm()) for one, other in pairs]
    return max(gaps) if all(gap == gap for gap in gaps) else float("nan")


def _states(wanted: Wanted, device: torch.device) -> list[Tensor]:
    """Draw queries, keys and values, without torch's own random numbers."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(prompt + sum(answers) for prompt, answers in GROUPS)
    sizes = (
        (wanted.heads, wanted.head_dim),
        (wanted.key_heads, wanted.head_dim),
        (wanted.key_heads, wanted.value_dim),
    )
    drawn = (torch.randn(1, heads, tokens, size, generator=generator) for heads, size in sizes)
    return [states.to(device, wanted.dtype).requires_grad_() for states in drawn]


def row_of(groups: Iterable[tuple[int, tuple[int, ...]]], device: torch.device) -> Sequences:
    """Lay groups of these lengths end to end; each has a prompt and as many completions."""
    groups = list(groups)
    queries, keys, index, at = [0], [0], list[int](), 0
    for prompt, answers in groups:
        shared = range(at, at + prompt)
        for number, length in enumerate((prompt, *answers)):
            index += [*shared, *range(at, at + length)] if number else shared
            at += length
            queries.append(at)
            keys.append(len(index))
    prompts, counts = [prompt for prompt, _ in groups], [len(answers) for _, answers in groups]
    return Sequences(
        cu_seqlens_q=torch.tensor(queries, dtype=torch.int32, device=device),
        cu_seqlens_k=torch.tensor(keys, dtype=torch.int32, device=device),
        key_index=torch.tensor(index, device=device),
        prompt_lengths=torch.tensor(prompts, device=device),
        group_sizes=torch.tensor(counts, device=device),
        tokens=at,
        max_queries=max(b - a for a, b in pairwise(queries)),
        max_keys=max(b - a for a, b in pairwise(keys)),
        max_prompt=max(prompts),
        max_answers=max(sum(answers) for _, answers in groups),
        prompt_tokens=sum(prompts),
        most_completions=max(counts),
        fewest_completions=min(counts),
    )


def _by_definition(
    states: list[Tensor], row: Sequences, softcap: float | None, window: int | None
) -> Tensor:
    """Attend sequence by sequence in float64: `[1, T, H, D]`."""
    query, key, value = (part.double() for part in states)
    times, parts = query.shape[1] // key.shape[1], []
    ends = (row.cu_seqlens_q.tolist(), row.cu_seqlens_k.tolist())
    for (first, last), (start, stop) in zip(*map(pairwise, ends), strict=True):
        own, seen = query[:, :, first:last], row.key_index[start:stop]
        keys, values = (part[:, :, seen].repeat_interleave(times, 1) for part in (key, value))
        scores = own @ keys.mT * query.shape[-1] ** -0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        before = stop - start - (last - first)
        unseen = torch.ones_like(scores, dtype=torch.bool).triu(before + 1)
        if window is not None:
            unseen |= torch.ones_like(unseen).tril(before - window)
        parts.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values)
    return torch.cat(parts, 2).transpose(1, 2)
