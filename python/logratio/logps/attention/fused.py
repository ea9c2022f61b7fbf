"""Attention of shared prompts in few calls a layer, where a kernel for that is at hand: on CUDA."""

from functools import cache

import torch
from torch import Tensor

from logratio.logps.attention.kernels import (
    Choice,
    Kernel,
    Wanted,
    kernel_for,
    missing_kernels,
    tell,
)
from logratio.logps.attention.merged import merging_pays
from logratio.logps.attention.one_call import attend_in_one_call
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.attention.segments import SharedPrompt
from logratio.logps.attention.tree import SharedTree
from logratio.logps.attention.trial import failure


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
