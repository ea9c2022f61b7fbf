"""Scaled dot-product attention, group by group: for a CPU, where a call costs little."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from logratio.logps.attention.segments import SharedPrompt


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_prompt: SharedPrompt,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`."""
    heads = query.shape[1] // key.shape[1]
    queries = query.split(shared_prompt.queries, dim=2)
    keys = _repeated(key, heads).split(shared_prompt.groups, dim=2)
    values = _repeated(value, heads).split(shared_prompt.groups, dim=2)
    out = []
    for group, (prompt_mask, answer_mask) in enumerate(shared_prompt.masks(window)):
        prompt, k, v = shared_prompt.prompts[group], keys[group], values[group]
        out.append(
            scaled_dot_product_attention(
                queries[2 * group],
                k[:, :, :prompt],
                v[:, :, :prompt],
                attn_mask=prompt_mask,
                is_causal=prompt_mask is None,
                dropout_p=dropout,
                scale=scaling,
            )
        )
        out.append(
            scaled_dot_product_attention(
                queries[2 * group + 1], k, v, answer_mask, dropout_p=dropout, scale=scaling
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2)


def _repeated(heads: Tensor, times: int) -> Tensor:
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)
