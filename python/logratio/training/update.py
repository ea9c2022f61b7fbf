"""One update: the gradient of an objective over the groups of an update, and an optimizer step."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import Store
from logratio.data.feed import MicroBatch, lay_out
from logratio.data.store.load import source_names
from logratio.logps.batch import Batch, Part, shape_for, to_torch
from logratio.logps.completion import completion_logps, completion_loss, route
from logratio.logps.head_loss import unit_gradient
from logratio.logps.router import RouterSums
from logratio.training.config import TrainConfig
from logratio.training.given_model import given_model
from logratio.training.losses import averages, make_objective
from logratio.training.metrics import NonFiniteError, not_finite
from logratio.training.models import autocast, precision_of
from logratio.training.optimizers import (
    AdamSettings,
    clip_gradients,
    make_optimizer,
    widen_gradients,
)
from logratio.training.reference import Reference, same_random_state, side_effect_free
from logratio.training.router_loss import RouterLoss
from logratio.training.validation import beta_of


class Scored(NamedTuple):
    """Inputs of the metrics for some groups: losses `[B]`, the other fields `[N]`, on device."""

    losses: Tensor
    policy: Tensor
    reference: Tensor
    lengths: Tensor


class Updater:
    """Runs the updates of a policy; its parameters that require gradients are trained.

    Args:
        config: Settings of the run.
        store: The tokenized groups.
        policy: The model to train.
        reference: The reference model of the log-ratios; None if the loss has none.
        layout: Batch layout: "shared", "tree" or "padded".

    Attributes:
        parameters: The trained parameters.
        optimizer: The optimizer, with its state.
        objective: The loss and its metrics.
        router: The load-balancing loss of a mixture of experts; None: there is none.
        device: The device of the policy.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        policy: nn.Module,
        reference: Reference | None,
        layout: str,
    ) -> None:
        self.config, self.store = config, store
        self.policy, self.reference, self.layout = policy, reference, layout
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(config.optimizer, self.parameters, AdamSettings.of(config))
        self.objective = make_objective(config, beta_of(config))
        self.router = RouterLoss.of(config, policy)
        if given := given_model(config.model):
            given.is_trained = True
        self._recent: deque[dict[str, float]] = deque(maxlen=5)

    def update(
        self, step: int, rate: float, batches: Iterator[MicroBatch]
    ) -> tuple[dict[str, float], int]:
        """Run one update.

        Args:
            step: Number of the update, from 1.
            rate: Learning rate.
            batches: The micro-batches of the update.

        Returns:
            The metrics of the update, and its number of groups.

        Raises:
            NonFiniteError: A loss or gradient is not finite; the weights were not changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        scored, groups = list[Scored](), []
        if self.router:
            batches = self.router.start(batches, self._route)
        for micro in batches:
            groups.append(micro.layout.groups.copy())
            if len(groups) > 1:
                widen_gradients(self.parameters)
            scored += self.accumulate(to_torch(micro.layout, self.device), micro.groups)
            del micro  # releases its buffer before the next micro-batch is requested
        norm = clip_gradients(self.optimizer, self.config.max_grad_norm)
        columns = self.objective.columns(*map(torch.cat, zip(*scored, strict=True)))
        router = {"aux_loss": self.router.value()} if self.router else {}
        values = averages(columns, grad_norm=norm, **router) | {"lr": rate}
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteError(self._describe_nonfinite(step, values, groups))
        self.optimizer.step()
        self._recent.append(values)
        return values, sum(map(len, groups))

    def accumulate(self, batch: Batch, count: int) -> list[Scored]:
        """Accumulate a micro-batch's gradient; return the inputs of its metrics, part by part.

        Args:
            batch: The micro-batch.
            count: Number of groups in the whole update, over which the loss is a mean.
        """
        reference, scored = self._reference_sums(batch), list[Scored]()

        def share(logps: Tensor, part: Part) -> Tensor:
            sums, lengths = part.targets.sums(logps), part.targets.lengths
            references = reference[part.completions]
            losses = self.objective.losses(sums, references, lengths)
            scored.append(Scored(losses.detach(), sums.detach(), references, lengths))
            return losses.sum() / count

        sums = self.router.sums() if self.router else None
        with self.autocast():
            terms = [completion_loss(self.policy, batch, share, sums.add if sums else None)]
        if self.router and sums:
            terms.append(self.router.share(sums))
        terms = [term for term in terms if term.requires_grad]  # routers may see no trained weight
        torch.autograd.backward(terms, [unit_gradient(t.device, t.dtype) for t in terms])
        return scored

    def _route(self, batches: list[MicroBatch], sums: RouterSums) -> None:
        """Add the tokens of an update to the sums of its load-balancing loss."""
        with same_random_state(self.policy):  # adapters drop the same values as in training
            for micro in batches:
                with self.autocast():
                    route(self.policy, to_torch(micro.layout, self.device), sums.add)

    def rehearse(self, batches: Sequence[np.ndarray]) -> None:
        """Accumulate the gradients of micro-batches, as an update does, without a step.

        Args:
            batches: The groups of each micro-batch.
        """
        for groups in batches:
            self.accumulate(self._batch(groups), len(groups))

    def _batch(self, groups: np.ndarray) -> Batch:
        shape = shape_for(self.layout, self.device)
        return to_torch(lay_out(self.store, groups, self.layout, **shape), self.device)

    def _reference_sums(self, batch: Batch) -> Tensor:
        """Return the summed log-probs `[N]` under the reference; zeros if there is none."""
        if self.reference is None:
            return torch.zeros(len(batch.targets.rows), dtype=torch.float64, device=self.device)
        with self.autocast():
            return self.reference.sums(batch)

    def autocast(self) -> AbstractContextManager[None]:
        """Return an autocast context for one pass.

        Autocast caches its casts of the weights, with or without gradients, until it exits. So a
        block must not outlive an update, nor mix passes with and without gradients.
        """
        return autocast(precision_of(self.config), self.device)

    def _describe_nonfinite(
        self, step: int, values: dict[str, float], batches: list[np.ndarray]
    ) -> str:
        """Describe the values and records that are not finite, and the likely cause."""
        groups = np.concatenate(batches)
        with torch.no_grad(), side_effect_free(self.policy):
            sums = [self._policy_sum(self._batch(group[None])) for group in groups]
        culprits = [
            int(one) for one, value in zip(groups, sums, strict=True) if not math.isfinite(value)
        ]
        return not_finite(
            step, values, self._recent, self._names(culprits, len(groups)), self.config.lr
        )

    def _names(self, culprits: list[int], groups: int) -> str:
        if len(culprits) == groups > 1:
            return f"records: all {groups} of the update"
        names = ", ".join(source_names(self.store, culprits))
        return f"records: {names}" if names else "no single record is to blame"

    def _policy_sum(self, batch: Batch) -> float:
        with self.autocast():
            return float(batch.targets.sums(completion_logps(self.policy, batch)).sum())
