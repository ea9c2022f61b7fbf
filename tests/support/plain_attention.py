"""Attention over sequences of a batch, done plainly, and batches to try it on."""

import numpy as np
import torch
from layout_oracle import store_of
from random_groups import random_groups
from torch import Tensor

from logratio.data.feed import lay_out
from logratio.logps.batch import Sequences, SharedBatch, fields_for, to_torch
from logratio.logps.completion import score

NUMBERS = np.array([3, 0, 4, 1, 2])


FIELDS = fields_for("shared", "cuda")


def batch_of_sequences(seed: int, width: int | None = None, most: int | None = None) -> SharedBatch:
    """A batch as a GPU gets it; `most` completions a group."""
    groups = [(prompt, answers[:most]) for prompt, answers in random_groups(seed)]
    batch = to_torch(lay_out(store_of(groups), NUMBERS, fields=FIELDS, width=width))
    assert isinstance(batch, SharedBatch)
    return batch


def sequences_of(batch: SharedBatch) -> Sequences:
    assert batch.sequences is not None
    return batch.sequences


States = tuple[Tensor, Tensor, Tensor]


def heads(batch: SharedBatch, many: int, kv: int, dtype: torch.dtype = torch.float64) -> States:
    """Random queries, keys and values, `[1, heads, T, 8]`."""
    torch.manual_seed(0)
    shape = (1, batch.input_ids.shape[1], 8)

    def random(count: int) -> Tensor:
        return torch.randn(count, *shape, dtype=dtype).transpose(0, 1).requires_grad_()

    return random(many), random(kv), random(kv)


def plain_mask(batch: SharedBatch, window: int | None) -> Tensor:
    """Visibility of keys in the row, bool `[T, T]`, token by token from the lengths alone."""
    prompts, completions = batch.prompt_lengths, batch.completion_lengths
    part = [
        (group, number, place + (prompts[group] if number else 0))
        for group, answers in enumerate(completions)
        for number, length in enumerate([prompts[group], *answers])
        for place in range(length)
    ]
    part += [(-1, 0, place) for place in range(batch.input_ids.shape[1] - len(part))]
    mask = torch.zeros(len(part), len(part), dtype=torch.bool)
    for q, (group, number, place) in enumerate(part):
        for k, (other, owner, before) in enumerate(part):
            near = window is None or place - before < window
            mask[q, k] = group == other and owner in (0, number) and before <= place and near
    return mask


def score_and_gradient(model: torch.nn.Module, batch: SharedBatch) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of a weighted sum of them with respect to every parameter."""
    model.zero_grad()
    logps = score(model, batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(parts)
