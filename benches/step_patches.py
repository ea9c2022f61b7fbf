"""Rungs of the ladder that no setting of ours reaches: one part is put back to what others do.

Each patch is a function without arguments in `PATCHES`; it changes a module of ours in the worker
that named it. What it replaces must be there, or it fails: a rung never measures what it is not.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from logratio.logps import completion
from logratio.logps.tensors import Batch
from logratio.training import loop, trainer

LOOP: Any = loop
TRAINER: Any = trainer  # modules as what they are here: things whose parts are exchanged


def replace(module: Any, name: str, new: Any) -> None:
    """Replace an attribute that must exist.

    Raises:
        AttributeError: it does not: the patch has to be written anew.
    """
    getattr(module, name)
    setattr(module, name, new)


def separate_rows() -> None:
    """Two padded rows a pair, of our own collator, in place of shared prompts."""
    replace(TRAINER, "choose_layout", lambda policy: ("padded", "the bench asks for it"))


def gathered(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """Whole logits of `hidden` `[n, H]` in float32, log_softmax, gather: float32 `[n]`."""
    logits = completion.head_logits(model, hidden).float()
    return logits.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


def whole_head() -> None:
    """Whole logits at the completions' positions, no tiles, nothing recomputed."""

    def logps(model: nn.Module, batch: Batch) -> Tensor:
        inner, targets = completion.transformer(model), batch.targets
        hidden = completion._hidden_states(inner, batch).flatten(0, 1)
        return gathered(inner, hidden.index_select(0, targets.logit_index), targets.target_ids)

    replace(LOOP, "completion_logps", logps)


def head_everywhere() -> None:
    """Whole logits at every position, prompts included, as a model's own forward makes them."""

    def logps(model: nn.Module, batch: Batch) -> Tensor:
        inner, targets = completion.transformer(model), batch.targets
        hidden = completion._hidden_states(inner, batch).flatten(0, 1)
        tokens = completion.head_logits(inner, hidden).float().log_softmax(-1)
        return tokens[targets.logit_index, targets.target_ids]

    replace(LOOP, "completion_logps", logps)


def recomputed_layers() -> None:
    """Transformers' own activation checkpointing, every layer."""
    build = TRAINER.build_policy

    def built(*given: Any) -> nn.Module:
        policy: nn.Module = build(*given)
        inner = completion.transformer(policy)
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        return policy.train()  # it has no dropout, and only then recomputes

    replace(TRAINER, "build_policy", built)


PATCHES: Mapping[str, Callable[[], None]] = {
    "separate_rows": separate_rows,
    "whole_head": whole_head,
    "head_everywhere": head_everywhere,
    "recomputed_layers": recomputed_layers,
}
