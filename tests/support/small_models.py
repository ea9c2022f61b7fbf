"""A small model of every causal language model of transformers, and what it computes alone."""

import numpy as np
import torch
from oracle import Group
from small_configs import VOCABULARY, WINDOW, small_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from logratio.logps.completion import reset_dynamic_rope
from logratio.training.models import quietly, with_softcap, without_dropout


def small_model(kind: str, seed: int) -> PreTrainedModel:
    """The small model of a `model_type`: see `model_of`."""
    return model_of(small_config(kind), seed)


def model_of(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model in which no weight is 0 or 1 as most biases, gates and norms are at first."""
    torch.manual_seed(seed)
    with quietly():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                is_matrix = parameter.dim() > 1
                parameter.mul_(6.0 if is_matrix else 1.0)
                parameter.add_(torch.randn_like(parameter) * (0.02 if is_matrix else 0.1))
    ready: PreTrainedModel = with_softcap(without_dropout(model)).eval()
    return ready


def groups_of(seed: int) -> list[Group]:
    """One to five completions, most of them longer than windows, blocks and numbers of keys."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(token) for token in random.integers(3, VOCABULARY, length)]

    shapes = [
        (3 * WINDOW, [2 * WINDOW, 40]),
        (1, [5]),
        (21, [1, 13, 4]),
        (9, [70, 3, 8, 20]),
        (2, [30, 12, 1, 7, 22]),
    ]
    return [(ids(prompt), [ids(length) for length in lengths]) for prompt, lengths in shapes]


def alone(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Score each completion by the model's own forward pass, unpadded: float64 `[S]`."""
    scored = []
    for prompt, completions in groups:
        for completion in completions:
            reset_dynamic_rope(model)
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
            logps = torch.log_softmax(logits[0, len(prompt) - 1 : -1].double(), -1)
            scored.append(logps.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(scored)
