"""Log-probs computed the plain way, in float64: one unpadded sequence at a time, whole logits.

Written apart from the library: it uses a model's own forward with eager attention and nothing of
logratio's layouts, attention or head.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Group = tuple[list[int], list[list[int]]]


def in_float64(model: nn.Module) -> PreTrainedModel:
    """Copy a model into float64 with eager attention, and experts one after the other."""
    twin = copy.deepcopy(model).double()
    assert isinstance(twin, PreTrainedModel)
    twin.set_attn_implementation("eager")
    twin.set_experts_implementation("eager")
    twin.eval()
    return twin


def per_token_logps(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Score each completion on its own: float64 `[S]`, group-major."""
    scored = []
    for prompt, completions in groups:
        for completion in completions:
            ids = torch.tensor([prompt + completion])
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
            logps = torch.log_softmax(logits, dim=-1)
            for place, token in enumerate(completion):
                scored.append(logps[len(prompt) + place - 1, token])
    return torch.stack(scored)
