"""Attention of a whole row in a call or two a layer, by the name of its kernel."""

from torch import Tensor

from logratio.logps.attention.flash import flash_of
from logratio.logps.attention.flex import attend_row
from logratio.logps.attention.kernels import MERGED, Kernel
from logratio.logps.attention.merged import attend_merged
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.attention.varlen import attend_sequences
from logratio.logps.sequences import Sequences


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
