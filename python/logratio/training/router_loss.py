"""The router's load-balancing loss of a run: its coefficient, and its value for each update.

The loss is that of transformers for one padded batch with all rows of the update (see
`logps.router`). It is a product of two means over the update's tokens, so it is not the mean of the
losses of its micro-batches, which is what other trainers add up. Here a pass without gradients
first counts how often each expert is chosen in the whole update, and the loss is linear in the
rest. So the result does not depend on how an update is cut into micro-batches. The pass runs the
body only, without head and reference, and adds about a quarter to a third to an update's time. An
update that is one micro-batch needs no such pass.

Considered instead: the counts of the micro-batch, which need no pass, but give another loss for
each `token_budget`; and the counts of the update before, which are those of other tokens.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from logratio.data.feed import MicroBatch
from logratio.errors import ConfigError
from logratio.logps.completion import transformer
from logratio.logps.router import RouterSums, balancing_loss
from logratio.training.config import PathLike, TrainConfig
from logratio.training.models import architecture, base_folder
from logratio.training.parallel.processes import Processes


def router_coefficient(config: TrainConfig) -> float:
    """Return the coefficient of the run's load-balancing loss; 0: there is none.

    It is `router_aux_loss_coef`, or the model's own if the model's config sets
    `output_router_logits`, with which transformers adds the loss in training too.

    Raises:
        ConfigError: A coefficient is set, and the model's family has no such loss; or the model's
            config requests the loss without a coefficient.
    """
    given = config.router_aux_loss_coef
    model = architecture(base_folder(config.model))
    if not _has_loss(model):
        if given:
            raise ConfigError(
                f"router_aux_loss_coef {given} is the weight of a load-balancing loss, and "
                f"transformers has none for models of type {model.model_type}: remove it"
            )
        return 0.0
    if given is not None:
        return given
    if not getattr(model.get_text_config(), "output_router_logits", False):
        return 0.0
    if (own := _own_coefficient(model)) is None:
        raise ConfigError(
            f"{config.model}: its config sets output_router_logits, which requests the router's "
            "load-balancing loss, but no coefficient: set router_aux_loss_coef, or 0 for none"
        )
    return own


def coefficient_in_trl(folder: PathLike) -> float | None:
    """Return the coefficient that TRL uses for a model by default, or None without such a loss.

    TRL adds the loss to every mixture of experts, whatever `output_router_logits` is.
    """
    model = architecture(base_folder(folder))
    if not _has_loss(model):
        return None
    found: float | None = getattr(model.get_text_config(), "router_aux_loss_coef", None)
    return found


def _has_loss(model: PreTrainedConfig) -> bool:
    """Return whether transformers adds a load-balancing loss to models of this family."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model)]
    return hasattr(sys.modules[found.__module__], "load_balancing_loss_func")


def _own_coefficient(model: PreTrainedConfig) -> float | None:
    """Return the coefficient in a config, under any family's name for it."""
    text: Any = model.get_text_config()
    for part, name in (
        (text, "router_aux_loss_coef"),
        (text, "aux_loss_coef"),  # JetMoe
        (getattr(text, "ffn_config", None), "moe_loss_weight"),  # DBRX
    ):
        if (value := getattr(part, name, None)) is not None:
            return float(value)
    return None


Count = Callable[[list[MicroBatch], RouterSums], None]
"""Adds the tokens of micro-batches to sums, in a pass without gradients."""


class RouterLoss:
    """The load-balancing loss of the updates of a policy.

    An update calls `start`, then for each micro-batch `sums` and `share`, then `value`.

    Args:
        coefficient: The loss's weight in the objective, above 0.
        policy: The model to train, a mixture of experts.
    """

    def __init__(self, coefficient: float, policy: nn.Module) -> None:
        self.coefficient = coefficient
        self._top_k = int(getattr(transformer(policy), "num_experts_per_tok"))  # noqa: B009
        self._whole: RouterSums | None = None
        self._values = list[Tensor]()

    @classmethod
    def of(cls, config: TrainConfig, policy: nn.Module) -> "RouterLoss | None":
        """Return the loss of a run, or None if it has none."""
        coefficient = router_coefficient(config)
        return cls(coefficient, policy) if coefficient else None

    def start(
        self, batches: Iterator[MicroBatch], count: Count, processes: Processes
    ) -> Iterator[MicroBatch]:
        """Begin an update: count the tokens of each expert, if it has several micro-batches.

        Args:
            batches: The micro-batches of the update in this process.
            count: Runs all of them. It draws the same dropout masks as the training pass.
            processes: The processes of the run; all call this together.

        Returns:
            The same micro-batches.
        """
        self._values, self._whole = [], None
        kept = [*islice(batches, 1)]
        if processes.count == 1 and len(kept[0].layout.groups) == kept[0].update_groups:
            return chain(kept, batches)
        kept += batches
        whole = RouterSums(self._top_k)
        count(kept, whole)
        whole.counts, whole.tokens = (
            processes.total(torch.as_tensor(sums)) for sums in (whole.counts, whole.tokens)
        )
        self._whole = whole
        return iter(kept)

    @property
    def whole(self) -> RouterSums | None:
        """Sums over all tokens of the update; None if it is one micro-batch."""
        return self._whole

    def sums(self) -> RouterSums:
        """Return empty sums, for one micro-batch of the update."""
        return RouterSums(self._top_k)

    def share(self, sums: RouterSums) -> Tensor:
        """Return a micro-batch's share of the coefficient times the update's loss, a scalar.

        Args:
            sums: Sums over the micro-batch's tokens.
        """
        value = balancing_loss(sums, self._whole or sums)
        self._values.append(value.detach())
        return self.coefficient * value

    def value(self) -> Tensor:
        """Return the loss of the update without its coefficient, as TRL logs it: a scalar.

        With several processes, the loss is the sum of their values.
        """
        if not self._values:
            assert self._whole is not None
            return 0 * torch.as_tensor(self._whole.tokens)
        return torch.stack(self._values).sum()
