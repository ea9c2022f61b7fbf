"""What ranks do to test context parallelism: attention, log-probs and gradients of a split row."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_models import FAMILIES, tiny
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from logratio.logps.attention.interface import shared_prompts
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.attention.split import attend_split
from logratio.logps.batch import Part, SharedBatch
from logratio.logps.completion import batch_of, completion_logps, completion_loss
from logratio.logps.context_parallel import ContextRanks, Division, split, split_over
from logratio.training.parallel.processes import join_processes

HEADS, KEY_HEADS, SIZE = 4, 2, 8
Lengths = Sequence[tuple[int, Sequence[int]]]
"""Tokens of each group's prompt, and of its completions."""


def row_of(lengths: Lengths, vocabulary: int = 16) -> SharedBatch:
    """Return a row of groups with these lengths."""
    random = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=random).tolist()

    groups = [(ids(prompt), [ids(n) for n in own]) for prompt, own in lengths]
    batch = batch_of(groups, "shared")
    assert isinstance(batch, SharedBatch)
    return batch


def inputs(lengths: Lengths) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and an output's gradient for the tokens of a row."""
    torch.manual_seed(17)
    tokens = sum(prompt + sum(own) for prompt, own in lengths)
    query, key, value, gradient = (
        torch.randn(tokens, heads, SIZE, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    return query, key, value, gradient


def dense(lengths: Lengths) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of queries, keys and values, of one call by a mask."""
    query, key, value, gradient = inputs(lengths)
    states = [one.transpose(0, 1).requires_grad_() for one in (query, key, value)]
    group, answer = list[int](), list[int]()
    for number, (prompt, completions) in enumerate(lengths):
        parts = [prompt, *completions]
        group += [number] * sum(parts)
        answer += [part for part, length in enumerate(parts) for _ in range(length)]
    groups, answers = torch.tensor(group), torch.tensor(answer)
    is_prompt_or_own = (answers == 0) | (answers[:, None] == answers)
    seen = ((groups[:, None] == groups) & is_prompt_or_own).tril()
    q, k, v = states
    out = scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(0, 1)
    return out.detach(), *(g.transpose(0, 1) for g in torch.autograd.grad(out, states, gradient))


def joined() -> ContextRanks:
    """Join the other ranks."""
    processes = join_processes()
    processes.start_group(torch.device("cpu"), even_alone=True)
    return ContextRanks(processes.rank, processes.count, None)


def attend(lengths: Lengths, file: str) -> None:
    """Attend as one rank of several; write its tokens, their output and the gradients."""
    ranks, batch = joined(), row_of(lengths)
    own = split(batch, ranks)
    division = Division(batch.prompt_lengths, batch.completion_lengths, ranks.count)
    runs = division.chunks(ranks.rank) + division.own_completions(ranks.rank)
    tokens = torch.tensor([token for run in runs for token in run.tokens], dtype=torch.int64)
    place = tokens if runs else torch.zeros(1, dtype=torch.int64)
    *given, gradient = (one[place] for one in inputs(lengths))
    states = [one.transpose(0, 1)[None].requires_grad_() for one in given]
    query, key, value = states
    out = attend_split(query, key, value, own, Scoring())[0]
    found = torch.autograd.grad(out, states, gradient[None][0], allow_unused=True)
    values = [out.detach(), *(one[0].transpose(0, 1) for one in found)]
    named = dict(zip("oqkv", (one[: len(tokens)].contiguous() for one in values), strict=True))
    save_file(named | {"tokens": tokens}, f"{file}.{ranks.rank}")


def score(lengths: Lengths, tile: int, file: str) -> None:
    """Compute log-probs, a loss and its gradients, whole and split; write the differences.

    Args:
        lengths: The row.
        tile: Positions per tile of the head.
        file: Where to write; the rank is added.
    """
    ranks = joined()
    vars(ranks)["tile_rows"] = lambda _: tile
    model = tiny(FAMILIES["llama"]()).double()
    batch = row_of(lengths, model.config.vocab_size)
    factors = torch.randn(len(batch.targets.target_ids), dtype=torch.float64)
    dist.broadcast(factors, 0)

    def loss_of(logps: Tensor, part: Part) -> Tensor:
        sums = part.targets.sums(logps * factors[part.targets_at])
        return (sums.sigmoid() * (torch.from_numpy(part.targets.rows) + 1)).sum()

    def values() -> list[Tensor]:
        model.zero_grad()
        logps = completion_logps(model, batch)
        assert logps.requires_grad
        loss = completion_loss(model, batch, loss_of)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [logps.detach(), loss.detach(), *gradients]

    with shared_prompts(model):
        whole = [one.clone() for one in values()]
        with split_over(ranks, model):
            shares = values()
    for one in shares[2:]:
        dist.all_reduce(one)
    gaps = [float((a - b).abs().max()) for a, b in zip(whole, shares, strict=True)]
    Path(f"{file}.{ranks.rank}").write_text(json.dumps(gaps))
