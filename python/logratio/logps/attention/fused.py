"""Attention of a whole row in one or two kernel calls per layer, for CUDA.

Kernels are tested on this machine before use: see `failure`.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logratio.logps.attention.flash import attend_merged, flash_of, merging_pays
from logratio.logps.attention.flex import attend_row
from logratio.logps.attention.kernels import (
    MERGED,
    Choice,
    Kernel,
    Wanted,
    constant_in_graphs,
    kernel_for,
    missing_kernels,
    report_choice,
)
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.attention.tree import SharedTree
from logratio.logps.attention.varlen import attend_sequences
from logratio.logps.sequences import Branches, Row, Runs, Sequences


def attend_in_one_call(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Row,
    scoring: Scoring,
) -> Tensor:
    """Attend within each sequence: `[1, H, T, D]` to `[1, T, H, D]`.

    Args:
        kernel: Any kernel except "sdpa".
        query: Queries `[1, H, T, D]`, in a dtype that the kernel supports.
        key: Keys `[1, Hk, T, D]`; `Hk` divides `H`.
        value: Values `[1, Hk, T, Dv]`.
        sequences: Sequences of the row, or runs of its tree.
        scoring: Scale, window, cap and dropout; settings that the kernel lacks are ignored.
    """
    if kernel == "flex":
        return attend_row(
            query, key, value, sequences, scoring.scaling, scoring.window, scoring.softcap
        )
    if kernel in MERGED:
        assert isinstance(sequences, Sequences)
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
"""Lengths of prompts and completions in the test; the total exceeds the largest tile, 128."""
TREE = ((None, 70), (0, 60), (1, 40), (0, 30), (None, 50), (4, 20))
"""Runs in the test of a tree: which run each continues, and its length."""
TOLERANCE = 0.05
"""Tolerance relative to the norm: far above bfloat16 rounding, far below the error of a wrong
mask."""
WINDOW = 37
"""Window of the test for layers that have one. It ends within prompts, within completions and
between the two, and is not a multiple of a tile. A window that is one token longer or shorter
changes values and gradients by a tenth of their norm, twice the tolerance."""


@cache
def failure(kernel: Kernel, wanted: Wanted, device: torch.device) -> str | None:
    """Test a kernel once per process; return the reason why it fails, or None.

    Raises:
        torch.OutOfMemoryError: There is not enough memory for a few hundred tokens.
    """
    # A new thread is free of the caller's autocast, no_grad, checkpoint and hooks.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_failure, kernel, wanted, device).result()


def _failure(kernel: Kernel, wanted: Wanted, device: torch.device) -> str | None:
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            worst = _worst_gap(kernel, wanted, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and launchers raise errors of many types
        reason = (str(error).splitlines() or [""])[0]
        return f"it fails here: {type(error).__name__}: {reason[:200]}"
    return None if worst <= TOLERANCE else f"its results are wrong here, by {worst:.2g}"


def _worst_gap(kernel: Kernel, wanted: Wanted, device: torch.device) -> float:
    """Return the largest relative error of values and gradients to float64 attention."""
    row = row_of_tree(TREE, device) if wanted.tree else row_of(GROUPS, device)
    states = _states(wanted, row.tokens, device)
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


def _states(wanted: Wanted, tokens: int, device: torch.device) -> list[Tensor]:
    """Draw random queries, keys and values, without advancing torch's global generator."""
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (wanted.heads, wanted.head_dim),
        (wanted.key_heads, wanted.head_dim),
        (wanted.key_heads, wanted.value_dim),
    )
    drawn = (torch.randn(1, heads, tokens, size, generator=generator) for heads, size in sizes)
    return [states.to(device, wanted.dtype).requires_grad_() for states in drawn]


def row_of(groups: Iterable[tuple[int, tuple[int, ...]]], device: torch.device) -> Sequences:
    """Build the sequences of a row from lengths of prompts and of their completions."""
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


def row_of_tree(runs: Iterable[tuple[int | None, int]], device: torch.device) -> Branches:
    """Build the row of a tree from the run that each run continues, and its length."""
    keys, starts = list[list[int]](), [0]
    for parent, length in runs:
        path = [] if parent is None else keys[parent]
        keys.append([*path, *range(starts[-1], starts[-1] + length)])
        starts.append(starts[-1] + length)
    host = Runs(
        np.array(starts, dtype=np.int32),
        np.cumsum([0, *map(len, keys)], dtype=np.int32),
        np.concatenate(keys),
    )
    arrays = (host.starts, host.key_offsets, host.key_index)
    return Branches.of(host, *(torch.from_numpy(array).to(device) for array in arrays))


def _by_definition(
    states: list[Tensor], row: Row, softcap: float | None, window: int | None
) -> Tensor:
    """Compute the attention by its definition, sequence by sequence in float64: `[1, T, H, D]`."""
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

    On a GPU, the choice of a kernel is printed once, with the reason for each faster one skipped.

    Args:
        query: Queries `[1, H, T, D]`.
        key: Keys `[1, Hk, T, D]`; `Hk` divides `H`.
        value: Values `[1, Hk, T, Dv]`.
        shared_prompt: Positions of prompts and completions in the row.
        scoring: Scale, window, cap, dropout and sinks.

    Returns:
        The output, or None if the chosen kernel is "sdpa", which needs several calls.

    Raises:
        KernelError: The kernel set by `use_kernel` does not support this attention.
    """
    sequences = shared_prompt.sequences
    kernel, dtype = kernel_of(query, key, value, shared_prompt, scoring), _dtype(query)
    if kernel == "sdpa" or sequences is None:
        return None
    query, key, value = (states.to(dtype) for states in (query, key, value))
    return attend_in_one_call(kernel, query, key, value, sequences, scoring)


def kernel_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_prompt: SharedPrompt | SharedTree,
    scoring: Scoring,
) -> Kernel:
    """Return the kernel that `attend_fused` uses for these arguments."""
    sequences, repeated = shared_prompt.sequences, False
    if isinstance(sequences, Sequences) and merging_pays(
        sequences, query.shape[1], key.shape[1]
    ):  # a branch, because a compiled layer knows the sizes as symbols
        repeated = True
    return _chosen(
        query.device,
        shared_prompt.kernel,
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
        tree=isinstance(sequences, Branches),
        repeated=repeated,
    )


@constant_in_graphs
def _chosen(device: torch.device, forced: Kernel | None, **wanted: Any) -> Kernel:
    """Choose and report a kernel."""
    choice = choose(Wanted(device=device.type, **wanted), device, forced)
    if device.type == "cuda":
        report_choice(choice)
    return choice.name


@cache
def choose(wanted: Wanted, device: torch.device, forced: Kernel | None) -> Choice:
    """Return the fastest kernel that supports `wanted` and passes the test, or `forced`."""
    choice = kernel_for(wanted, missing := missing_kernels(), forced)
    while not forced and choice.name != "sdpa" and (why := failure(choice.name, wanted, device)):
        missing += ((choice.name, why),)
        choice = kernel_for(wanted, missing)
    return choice


def _dtype(states: Tensor) -> torch.dtype:
    """Return the compute dtype: autocast casts inputs of torch's SDPA, but not of these kernels."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
