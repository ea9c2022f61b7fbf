"""Completions drawn from a model, for the KL to the reference and for judging."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from logratio.logps.completion import transformer
from logratio.training.models import quietly

SAMPLE_ROWS = 256
"""Completions drawn side by side."""


@torch.no_grad()
def sample_completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int = 0,
    greedy: bool = False,
) -> list[list[int]]:
    """Draw one completion of each prompt at temperature 1 from the whole distribution.

    Args:
        model: the policy, in eval mode.
        prompts: token ids.
        max_new_tokens: a completion that has not ended by then is cut there.
        stop_ids: tokens of which the first that is drawn ends a completion, and is its last
            token; empty: nothing ends one.
        seed: same seed, same completions; the caller's random state is untouched.
        greedy: take the most likely token instead of drawing.

    Returns:
        Token ids of each completion, with the token that ends it.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    drawn: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), SAMPLE_ROWS):
            rows = order[start : start + SAMPLE_ROWS]
            ids = _generate(model, [prompts[i] for i in rows], max_new_tokens, stop_ids, greedy)
            for row, completion in zip(rows, ids, strict=True):
                drawn[row] = _until_stop(completion, stop_ids)
    return drawn


def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    greedy: bool,
) -> list[list[int]]:
    inner = transformer(model)
    ids, mask = _left_padded(prompts, inner.device)
    how = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    own = inner.generation_config
    inner.generation_config = GenerationConfig()  # the folder's own would bend the distribution
    try:
        with quietly():
            out = model.generate(  # type: ignore[operator]  # of transformers, also through peft
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=not greedy,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=next(iter(stop_ids), 0),
                **how,
            )
    finally:
        inner.generation_config = own
    return out[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until_stop(completion: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = (place for place, token in enumerate(completion, 1) if token in stop_ids)
    return completion[: next(ends, None)]
