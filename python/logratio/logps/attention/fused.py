"""Attention of shared prompts in few calls a layer, where a kernel for that is at hand: on CUDA."""

import torch
from torch import Tensor

from logratio.logps.attention.flex import attend_row
from logratio.logps.attention.kernels import Wanted, kernel_for, missing_kernels, tell
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.attention.segments import SharedPrompt
from logratio.logps.attention.varlen import attend_sequences


def attend_fused(
    query: Tensor, key: Tensor, value: Tensor, shared_prompt: SharedPrompt, scoring: Scoring
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
    wanted = Wanted(
        device=query.device.type,
        dtype=_dtype(query),
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        softcap=scoring.softcap,
        dropout=scoring.dropout,
        sinks=scoring.sinks is not None,
        sequences=shared_prompt.sequences is not None,
    )
    choice = kernel_for(wanted, missing_kernels(), shared_prompt.kernel)
    if query.is_cuda:
        tell(choice)
    sequences = shared_prompt.sequences
    if choice.name == "sdpa" or sequences is None:
        return None
    query, key, value = (states.to(wanted.dtype) for states in (query, key, value))
    if choice.name == "flex":
        return attend_row(
            query, key, value, sequences, scoring.scaling, scoring.window, scoring.softcap
        )
    return attend_sequences(
        query,
        key,
        value,
        sequences,
        kernel=choice.name,
        scaling=scoring.scaling,
        softcap=scoring.softcap,
        dropout=scoring.dropout,
        window=scoring.window,
    )


def _dtype(states: Tensor) -> torch.dtype:
    """Return what to compute in: autocast knows torch's own attention, not these kernels."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
