"""Attention of a whole row in a call or two a layer, by a kernel that was tried here: for CUDA."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from logratio.logps.attention.flash import attend_merged, flash_of, merging_pays
from logratio.logps.attention.flex import attend_row
from logratio.logps.attention.kernels import (
    MERGED,
    Choice,
    Kernel,
    Wanted,
    kernel_for,
    missing_kernels,
    tell,
)
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.attention.tree import SharedTree
from logratio.logps.attention.varlen import attend_sequences
from logratio.logps.batch import Sequences


def attend_in_one_call(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scoring: Scoring,
) -> Tensor:
    """Attend within each sequence: `[1, H, T, D]` to `[1, T, H, D]`.

    Args:
        kernel: any but "sdpa".
        query: `[1, H, T, D]`, in a dtype that the kernel takes.
        key: `[1, Hk, T, D]`; `Hk` divides `H`.
        value: `[1, Hk, T, Dv]`.
        sequences: who sees whom.
        scoring: what becomes of the scores; what the kernel does not do is left out.
    """
    if kernel == "flex":
        return attend_row(
            query, key, value, sequences, scoring.scaling, scoring.window, scoring.softcap
        )
    if kernel in MERGED:
        return attend_merged(query, key, value, sequences, flash_of(kernel), scoring.scaling)
    return attend_sequences(
        query,
        key,
        value,
        sequences,
        kernel=kernel,
        scaling=scoring.scaling,
        softcap=scoring.softcap,
        dropout=scoring.dropout,
        window=scoring.window,
    )


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


def attend_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_prompt: SharedPrompt | SharedTree,
    scoring: Scoring,
) -> Tensor | None:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`.

    The first use of a kernel on a GPU is said, with the reason for each faster one passed over.

    Args:
        query: `[1, H, T, D]`.
        key: `[1, Hk, T, D]`; `Hk` divides `H`.
        value: `[1, Hk, T, Dv]`.
        shared_prompt: where prompts and completions lie.
        scoring: what becomes of the scores.

    Returns:
        None where "sdpa" is the kernel: attention in several calls, as on a CPU.

    Raises:
        KernelError: the kernel that `use_kernel` names cannot do it.
    """
    sequences = shared_prompt.sequences
    wanted = Wanted(
        device=query.device.type,
        dtype=_dtype(query),
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        heads=query.shape[1],
        key_heads=key.shape[1],
        softcap=scoring.softcap,
        dropout=scoring.dropout,
        sinks=scoring.sinks is not None,
        sequences=sequences is not None,
        windowed=scoring.window is not None,
        repeated=sequences is not None and merging_pays(sequences, query.shape[1], key.shape[1]),
    )
    choice = choose(wanted, query.device, shared_prompt.kernel)
    if query.is_cuda:
        tell(choice)
    if choice.name == "sdpa" or sequences is None:
        return None
    query, key, value = (states.to(wanted.dtype) for states in (query, key, value))
    return attend_in_one_call(choice.name, query, key, value, sequences, scoring)


@cache
def choose(wanted: Wanted, device: torch.device, forced: Kernel | None) -> Choice:
    """Return the fastest kernel that does what is wanted and is seen to work here, or `forced`."""
    choice = kernel_for(wanted, missing := missing_kernels(), forced)
    while not forced and choice.name != "sdpa" and (why := failure(choice.name, wanted, device)):
        missing += ((choice.name, why),)
        choice = kernel_for(wanted, missing)
    return choice


def _dtype(states: Tensor) -> torch.dtype:
    """Return what to compute in: autocast knows torch's own attention, not these kernels."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
