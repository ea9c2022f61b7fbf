"""Tiny reward models, and their scores computed the plain way."""

import torch
from oracle import Group
from tiny_models import FAMILIES
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from logratio.training.models import with_softcap, without_dropout


def tiny_reward_model(
    family: str | PreTrainedConfig = "llama", pad: int | None = None
) -> PreTrainedModel:
    """Build a random reward model with large weights, in eval mode without dropout."""
    config = FAMILIES[family]() if isinstance(family, str) else family
    config.num_labels, config.pad_token_id = 1, pad
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    with_softcap(without_dropout(model)).eval()
    return model


def plain_scores(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Score completions by transformers' own forward, one unpadded sequence at a time: `[N]`."""
    rows = [prompt + ids for prompt, completions in groups for ids in completions]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
