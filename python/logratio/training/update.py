"""One update: the gradient of an objective over the groups of an update, and an optimizer step."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import Store
from logratio.data.feed import MicroBatch, lay_out
from logratio.data.store.load import source_names
from logratio.logps.batch import Batch, Part, shape_for, to_torch
from logratio.logps.completion import completion_logps, completion_loss, route
from logratio.logps.divergence import divergence_loss
from logratio.logps.head_loss import LossOf, unit_gradient
from logratio.logps.router import RouterSums
from logratio.logps.scores import completion_scores, score_loss
from logratio.training.config import TrainConfig
from logratio.training.given_model import given_model
from logratio.training.methods.columns import Columns, averages
from logratio.training.methods.group_data import FirstPass, GroupData, UpdateStatistics
from logratio.training.methods.logps import GroupLogps
from logratio.training.methods.objective import Objective
from logratio.training.methods.token_weights import weighted_sums
from logratio.training.metrics import NonFiniteError, not_finite
from logratio.training.models import autocast, precision_of
from logratio.training.moving_reference import moving
from logratio.training.optimizers import (
    AdamSettings,
    clip_gradients,
    make_optimizer,
    widen_gradients,
)
from logratio.training.parallel.processes import Processes
from logratio.training.parallel.strategy import Whole
from logratio.training.reference import Reference, live_model, same_random_state, side_effect_free
from logratio.training.router_loss import RouterLoss

Load = Callable[[Callable[[str], nn.Module]], nn.Module]
"""Loads a model where a run has its models, from a function that builds it on a device."""


class Scored(NamedTuple):
    """Inputs of the metrics for some groups: their losses, `[B]`, and log-probs, on device."""

    losses: Tensor
    groups: GroupLogps


class Updater:
    """Runs the updates of a policy; its parameters that require gradients are trained.

    Args:
        config: Settings of the run.
        store: The tokenized groups.
        policy: The model to train.
        reference: The reference model of the log-ratios; None if the loss has none.
        layout: Batch layout: "shared", "tree" or "padded".
        strategy: How passes of the policy run; None: in this process alone.
        processes: The processes of the run.
        load: Returns the model that a function builds on a device, whole or in shards; None: whole.

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
        strategy: Whole | None = None,
        processes: Processes | None = None,
        load: Load | None = None,
    ) -> None:
        self.config, self.store = config, store
        self.policy, self.reference, self.layout = policy, reference, layout
        self.strategy, self.processes = strategy or Whole(policy), processes or Processes()
        self.parameters = self.strategy.parameters
        self.device = self.parameters[0].device
        self.optimizer = make_optimizer(config.optimizer, self.parameters, AdamSettings.of(config))
        self.load = load or (lambda build: build(str(self.device)))
        self.objective = Objective.of(config)
        self.data = GroupData.of(store, self.objective, config.study_flipped_labels, config.seed)
        self.router = RouterLoss.of(config, policy)
        if given := given_model(config.model):
            given.is_trained = True
        self._recent: deque[dict[str, float]] = deque(maxlen=5)

    def update(
        self, step: int, rate: float, batches: Iterator[MicroBatch], most: int = 0
    ) -> tuple[dict[str, float], int]:
        """Run one update.

        Args:
            step: Number of the update, from 1.
            rate: Learning rate.
            batches: The micro-batches of the update that fall to this process.
            most: The largest number of micro-batches of any process.

        Returns:
            The metrics of the update, and its number of groups, over all processes.

        Raises:
            NonFiniteError: A loss or gradient is not finite; the weights were not changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._seed(step)
        self.strategy.settle()
        self.optimizer.zero_grad(set_to_none=True)
        if self.router:
            batches = self.router.start(batches, partial(self._route, most), self.processes)
        first = None
        if self.objective.needs_statistics:
            kept = [*batches]
            first, batches = self._first_pass(kept, most), iter(kept)
            del kept
        scored, groups, nothing = list[Scored](), list[np.ndarray](), list[Scored]()
        for number, (micro, last) in enumerate(self._passes(batches, most)):
            if number:
                widen_gradients(self.parameters)
            if micro is None:
                nothing = self._take_part(first, last=last)
                continue
            groups.append(micro.layout.groups.copy())
            batch = to_torch(micro.layout, self.device)
            scored += self.accumulate(batch, micro.update_groups, first, last=last)
            del micro, batch  # releases its buffer before the next micro-batch is requested
        norm = clip_gradients(self.optimizer, self.config.max_grad_norm)
        columns = self._columns(scored or nothing)
        scalars = {"grad_norm": norm}
        if self.router:
            scalars["aux_loss"] = self.processes.total(self.router.value())
        values, count = averages(columns, self.processes.total_of_data, **scalars)
        values |= {"lr": rate}
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteError(self._describe_nonfinite(step, values, groups))
        self.optimizer.step()
        if follower := moving(self.reference):
            follower.follow(self.policy, step)
        self._recent.append(values)
        return values, sum(map(len, groups)) if self.processes.count == 1 else count

    def _seed(self, step: int) -> None:
        """Let every process but the first draw different numbers for the adapters' dropout."""
        if self.processes.rank:
            drawn = np.random.SeedSequence((self.config.seed, self.processes.rank, step))
            torch.manual_seed(int(drawn.generate_state(1)[0]))

    def _passes(
        self, batches: Iterator[MicroBatch], most: int
    ) -> Iterator[tuple[MicroBatch | None, bool]]:
        """Yield each micro-batch, and None where the others need this process; and if it ends."""
        done = 0
        for micro in batches:
            done += 1
            yield micro, done == self.strategy.passes(micro.count, most)
            del micro
        passes = self.strategy.passes(done, most)
        for number in range(done, passes):
            yield None, number + 1 == passes

    def _columns(self, scored: list[Scored]) -> Columns:
        losses, parts = zip(*scored, strict=True)
        return self.objective.columns(torch.cat(losses), GroupLogps.concatenated(parts))

    def _take_part(self, first: UpdateStatistics | None, *, last: bool) -> list[Scored]:
        """Compute a pass without groups: one that adds 0 to all gradients, and no metrics."""
        scored = self.accumulate(self._smallest, math.inf, first, last=last)
        return [Scored(part.losses[:0], part.groups.empty) for part in scored[:1]]

    @torch.no_grad()
    def _first_pass(self, batches: list[MicroBatch], most: int) -> UpdateStatistics:
        """Score all groups of an update without gradients, for what the loss takes from them."""
        scored = list[FirstPass]()
        with same_random_state(self.policy), self.autocast():  # the same dropout as in training
            for micro in batches:
                batch = to_torch(micro.layout, self.device)
                policy = self.policy_sums(batch)
                reference = self._reference_sums(batch)
                groups = self.data.groups(batch.targets, policy, reference)
                scored.append(FirstPass(groups, batch.targets.rows, reference))
            for _ in range(len(batches), self.strategy.passes(len(batches), most)):
                self.policy_sums(self._smallest)
                self._reference_sums(self._smallest)
        return UpdateStatistics.of(self.objective, scored, self.processes)

    @torch.no_grad()
    def policy_sums(self, batch: Batch, data: GroupData | None = None) -> Tensor:
        """Return the policy's sums of log-probs, or scores, that the loss takes, float64 `[N]`.

        Args:
            batch: The groups.
            data: What the data says about them; None: they are of the training data.
        """
        if self.objective.scores:
            return completion_scores(self.policy, batch).double()
        return self._sums(batch, completion_logps(self.policy, batch), data or self.data)

    @torch.no_grad()
    def sums_of(self, reference: Reference, batch: Batch, data: GroupData | None = None) -> Tensor:
        """Return the sums of a reference's log-probs that the loss takes, float64 `[N]`."""
        data = data or self.data
        if self.objective.weighs_tokens or data.turns is not None:
            return self._sums(batch, reference.logps(batch), data)
        return reference.sums(batch)

    def _sums(self, batch: Batch, logps: Tensor, data: GroupData) -> Tensor:
        weights = data.token_weights(self.objective, batch.targets)
        return weighted_sums(batch.targets, logps, weights)

    @cached_property
    def _smallest(self) -> Batch:
        """The group with the fewest tokens, as a batch."""
        return self._batch(np.array([self.store.shared_lengths().argmin()]))

    def accumulate(
        self,
        batch: Batch,
        count: float,
        first: UpdateStatistics | None = None,
        *,
        last: bool = True,
    ) -> list[Scored]:
        """Accumulate a micro-batch's gradient; return the inputs of its metrics, part by part.

        Args:
            batch: The micro-batch.
            count: Number of groups in the whole update, over which the loss is a mean.
            first: What the loss takes from the whole update, and the reference's sums; None: the
                reference scores the micro-batch, and statistics are those of each part.
            last: Whether it is this process's last one of the update.
        """
        rows, scored = batch.targets.rows, list[Scored]()
        reference = first.references(rows, self.device) if first else self._reference_sums(batch)
        weights = self.data.token_weights(self.objective, batch.targets)

        def share(logps: Tensor, part: Part) -> Tensor:
            own = None if weights is None else weights[part.targets_at]
            by_completion = self.objective.scores
            sums = logps.double() if by_completion else weighted_sums(part.targets, logps, own)
            groups = self.data.groups(
                part.targets, sums, reference[part.completions], *_distributions(part, logps, own)
            )
            groups = self._with_statistics(groups, first, part)
            losses = self.data.weighted(self.objective.losses(groups), part.targets)
            scored.append(Scored(losses.detach(), groups.detached()))
            return losses.sum() / count

        with self.strategy.adding(last=last):
            with self.autocast():
                loss = self.strategy.run(self._job(counts=math.isfinite(count)), batch, share)
            loss.backward(unit_gradient(loss.device, loss.dtype))
        return scored

    def _with_statistics(
        self, groups: GroupLogps, first: UpdateStatistics | None, part: Part
    ) -> GroupLogps:
        if not self.objective.needs_statistics:
            return groups
        if first is None:
            found = self.objective.statistics(groups.on_host(), trains=False)
            found = {name: value.to(self.device) for name, value in found.items()}
        else:
            found = first.of_rows(part.targets.rows, self.device)
        return replace(groups, statistics=found)

    def _job(self, *, counts: bool) -> Callable[..., Tensor]:
        """Return the loss of a batch as a function of the model, with that of its routers, if any.

        Args:
            counts: Whether the batch counts; False: it only gives the other processes a pass.
        """
        loss_of: Callable[..., Tensor] = completion_loss
        if self.objective.needs_confidences:
            loss_of = partial(completion_loss, collisions=True)
        if self.objective.scores:
            loss_of = score_loss
        if self.objective.needs_divergences:
            assert self.reference is not None
            loss_of = partial(divergence_loss, other=live_model(self.reference))
        if (router := self.router) is None:
            return loss_of

        def both(model: nn.Module, batch: Batch, share: LossOf) -> Tensor:
            sums = router.sums()
            loss = loss_of(model, batch, share, sums.add)
            return loss + router.share(sums) if counts else loss

        return both

    def _route(self, most: int, batches: list[MicroBatch], sums: RouterSums) -> None:
        """Add the tokens of this process's micro-batches to the sums of an update's routers."""
        nothing = RouterSums(sums.top_k)
        with same_random_state(self.policy):  # adapters drop the same values as in training
            for micro in batches:
                with self.autocast():
                    route(self.policy, to_torch(micro.layout, self.device), sums.add)
            for _ in range(len(batches), self.strategy.passes(len(batches), most)):
                with self.autocast():
                    route(self.policy, self._smallest, nothing.add)
        if not batches:
            sums.counts, sums.tokens = 0 * nothing.counts, 0 * nothing.tokens

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
            return self.sums_of(self.reference, batch)

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
        own = np.concatenate([*batches, np.empty(0, np.int64)])
        with torch.no_grad(), side_effect_free(self.policy):
            sums = [self._policy_sum(self._batch(np.array([group]))) for group in own]
            for _ in range(len(own), self.processes.highest(len(own))):
                self._policy_sum(self._smallest)  # if the model is sharded, others need this pass
        found = [int(one) for one, value in zip(own, sums, strict=True) if not math.isfinite(value)]
        found = found if self.processes.leads_share else []
        everyone = self.processes.share(source_names(self.store, found))
        names = [name for theirs in everyone for name in theirs]
        groups = int(self.processes.total_of_data(torch.tensor(len(own))))
        return not_finite(step, values, self._recent, _named(names, groups), self.config.lr)

    def _policy_sum(self, batch: Batch) -> float:
        with self.autocast():
            return float(self.policy_sums(batch).sum())


def confidences_of(part: Part, logps: Tensor, collisions: Tensor) -> Tensor:
    """Return the mean of log π(token) − log Σ π² of each completion, float64 `[N]`, detached."""
    return part.targets.sums(logps.detach() - collisions) / part.targets.lengths


def _distributions(
    part: Part, logps: Tensor, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the confidences and the divergences of a part's completions, float64 `[N]` each."""
    confidences = divergences = None
    if part.collisions is not None:
        confidences = confidences_of(part, logps, part.collisions)
    if part.divergences is not None:
        divergences = weighted_sums(part.targets, part.divergences, weights)
    return confidences, divergences


def _named(culprits: list[str], groups: int) -> str:
    """Describe the records that are to blame among the `groups` of an update."""
    if len(culprits) == groups > 1:
        return f"records: all {groups} of the update"
    return f"records: {', '.join(culprits)}" if culprits else "no single record is to blame"
