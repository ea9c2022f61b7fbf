"""Tiny mixtures of experts whose families have a load-balancing loss, and transformers' loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle import Group
from small_configs import kinds, small_config
from tiny_models import tiny
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from logratio.training.models import quietly
from logratio.training.router_loss import _has_loss

NO_PADDED_LOSS = {
    "doge": "its experts are not causal, so it is refused",
    "minimax_m3_vl_text": "in float64, rows of padding are NaN, and the loss with them",
}
"""Families for which transformers computes no loss of a padded batch that is of use here."""
COEFFICIENT = 0.7
"""Large enough for the load-balancing loss to dominate the gradients of routers."""


def router_kinds() -> list[str]:
    """The `model_type` of each causal language model with a load-balancing loss."""
    return [
        kind
        for kind in kinds()
        if kind not in NO_PADDED_LOSS
        and any(c.model_type == kind and _has_loss(c()) for c in MODEL_FOR_CAUSAL_LM_MAPPING)
    ]


def small_mixture(kind: str) -> PreTrainedModel:
    """Make a tiny model in float32, without windows, which padding would fill with NaN."""
    config: Any = small_config(kind)
    text = config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = 256
    if kind == "flint":
        text.mlp_only_layers = []
    with quietly():
        model = tiny(config, scale=6.0)
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
    return model


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Let float32 mean float64 inside the block, in routers and in transformers' loss."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def rows_of(groups: list[Group]) -> list[tuple[list[int], list[int]]]:
    """The prompt and the completion of each row of a padded batch."""
    return [(prompt, ids) for prompt, completions in groups for ids in completions]


def padded_forward(model: PreTrainedModel, groups: list[Group]) -> Any:
    """Run transformers' own forward on a padded batch, with the completions as labels.

    The output has `loss`, the mean over completion tokens plus `COEFFICIENT` times `aux_loss`.
    """
    rows = rows_of(groups)
    width = max(len(prompt) + len(ids) for prompt, ids in rows)
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        mask[row, :stop] = 1
        labels[row, len(prompt) : stop] = torch.tensor(answer)
    name = "aux_loss_coef" if hasattr(model, "aux_loss_coef") else "router_aux_loss_coef"
    setattr(model, name, COEFFICIENT)
    return model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        output_router_logits=True,
        use_cache=False,
    )
