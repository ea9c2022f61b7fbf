"""The training loop: one update is a fixed number of groups, whatever the micro-batches."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from logratio._rust import Store
from logratio.data.feed import Feed, FeedSettings, MicroBatch, lay_out, micro_batches
from logratio.data.store.load import datasets_of, source_names
from logratio.errors import LogratioError
from logratio.logps.batch import Batch, Part, buffers_for, shape_for, to_torch
from logratio.logps.completion import completion_logps, completion_loss
from logratio.logps.head_loss import unit
from logratio.progress import Advance, progress, say
from logratio.training import checkpoint
from logratio.training.checkpoint import RunInterruptedError, interrupts
from logratio.training.config import TrainConfig
from logratio.training.losses import averages, learning_rate, make_objective
from logratio.training.metrics import MetricsLog
from logratio.training.models import autocast, precision_of, training_budget
from logratio.training.optimizers import (
    clip_gradients,
    make_optimizer,
    state_bytes,
    widen_gradients,
)
from logratio.training.reference import Reference
from logratio.training.reference_checks import check_start
from logratio.training.run_folder import CHECKPOINTS, identity
from logratio.training.validation import beta_of


class NonFiniteError(LogratioError, ArithmeticError):
    """A loss or gradient is NaN or infinite; no weight was touched by it."""


class SaveError(LogratioError, OSError):
    """A model or checkpoint could not be written; what was saved before is as it was."""


class _Scored(NamedTuple):
    """What metrics are made of, of some groups: losses `[B]`, the rest `[N]`, on their device."""

    losses: Tensor
    policy: Tensor
    reference: Tensor
    lengths: Tensor


class Loop:
    """Updates of one policy: order, gradients, checks, metrics, checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        policy: nn.Module,
        reference: Reference | None,
        layout: str,
    ) -> None:
        self.config, self.store, self.policy = config, store, policy
        self.reference, self.layout = reference, layout
        self.beta, self.precision = beta_of(config), precision_of(config)
        self.identity = identity(config, store)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(config.optimizer, self.parameters, config.lr)
        self.device = self.parameters[0].device
        self.objective = make_objective(config, self.beta)
        self.recent: deque[dict[str, float]] = deque(maxlen=5)

    @property
    def state_bytes(self) -> float:
        """What the optimizer takes on the policy's device."""
        name = self.config.optimizer
        return sum(p.numel() * state_bytes(name, p.dtype, p.device) for p in self.parameters)

    def run(self, updates: int, show_progress: bool) -> tuple[int, list[dict[str, float]]]:
        """Do all updates that a checkpoint has not done yet."""
        output = Path(self.config.output)
        start = self._resume() if self.config.resume else 0
        if self.reference is not None:
            self._check_start(self.reference, is_first=start == 0)
        history = []
        with (
            MetricsLog(output, start) as log,
            interrupts() as interrupted,
            progress(
                self.config.loss, len(self.store) * self.config.epochs, "pairs", show=show_progress
            ) as advance,
        ):
            advance(min(start * self.config.batch_size, len(self.store) * self.config.epochs))
            feed = self._feed(start)
            with closing(iter(feed)) as batches:
                for step, (_, update) in enumerate(groupby(batches, _place), start + 1):
                    values, groups = self._update(step, updates, update)
                    values["epoch"] = step / feed.updates_per_epoch
                    log.write(step, values)
                    history.append(values)
                    self.recent.append(values)
                    _report(advance, groups, values)
                    self._maybe_save(step, updates, interrupted())
        return updates, history

    def _feed(self, start: int) -> Feed:
        """Return the micro-batches after update `start`."""
        feed = Feed(
            self.store,
            self._feed_settings,
            epochs=self.config.epochs,
            allocate=buffers_for(self.device),
        )
        feed.start_after(start)
        return feed

    @property
    def _feed_settings(self) -> FeedSettings:
        return FeedSettings(
            groups_per_update=self.config.batch_size,
            token_budget=training_budget(self.config),
            layout=self.layout,
            seed=self.config.seed,
            weights=self.config.mix,
            datasets=datasets_of(self.store) if self.config.mix else None,
            **shape_for(self.layout, self.device),
        )

    def first_batches(self, count: int) -> list[np.ndarray]:
        """Return the groups of each of the first micro-batches of the run, `count` at most."""
        return micro_batches(self._feed_settings.plan(self.store, epoch=0))[:count]

    def rehearse(self, groups: np.ndarray) -> None:
        """Add the gradients of a micro-batch, as an update does; nothing else changes."""
        self._backward(self._batch(groups), len(groups))

    def _update(
        self, step: int, updates: int, batches: Iterator[MicroBatch]
    ) -> tuple[dict[str, float], int]:
        """Do one update; return its metrics and how many groups it had."""
        rate = learning_rate(self.config, step - 1, updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        scored, groups = list[_Scored](), []
        for micro in batches:
            groups.append(micro.layout.groups.copy())
            if len(groups) > 1:
                widen_gradients(self.parameters)
            scored += self._backward(to_torch(micro.layout, self.device), micro.groups)
            del micro  # or its buffer would wait here for the next one
        norm = clip_gradients(self.optimizer, self.config.max_grad_norm)
        columns = self.objective.columns(*map(torch.cat, zip(*scored, strict=True)))
        values = averages(columns, grad_norm=norm) | {"lr": rate}
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteError(self._blame(step, values, groups))
        self.optimizer.step()
        return values, sum(map(len, groups))

    def _backward(self, batch: Batch, count: int) -> list[_Scored]:
        """Add a micro-batch's share of the update's gradient; return what was scored, by parts."""
        reference, scored = self._reference_sums(batch), list[_Scored]()

        def share(logps: Tensor, part: Part) -> Tensor:
            sums, lengths = part.targets.sums(logps), part.targets.lengths
            references = reference[part.completions]
            losses = self.objective.losses(sums, references, lengths)
            scored.append(_Scored(losses.detach(), sums.detach(), references, lengths))
            return losses.sum() / count

        with self._autocast():
            loss = completion_loss(self.policy, batch, share)
        loss.backward(unit(loss.device, loss.dtype))
        return scored

    def _batch(self, groups: np.ndarray) -> Batch:
        shape = shape_for(self.layout, self.device)
        return to_torch(lay_out(self.store, groups, self.layout, **shape), self.device)

    def _reference_sums(self, batch: Batch) -> Tensor:
        """Return the sums `[N]` under the reference, zeros where there is none."""
        if self.reference is None:
            return torch.zeros(len(batch.targets.rows), dtype=torch.float64, device=self.device)
        with self._autocast():
            return self.reference.sums(batch)

    def _autocast(self) -> AbstractContextManager[None]:
        """Open autocast for one pass.

        It keeps its copies of the weights, and whether they have gradients, until it closes, so a
        block must neither outlive an update nor mix a pass with gradients and one without.
        """
        return autocast(self.precision, self.device)

    def _check_start(self, reference: Reference, *, is_first: bool) -> None:
        """Compare the reference with what should equal it, and say what it was made under."""
        objective = self.objective if is_first else None
        told = check_start(self.config, self.store, self.policy, reference, self.layout, objective)
        if told:
            say(told)

    def _blame(
        self,
        step: int,
        values: dict[str, float],
        batches: list[np.ndarray],
    ) -> str:
        """Say what was not finite, for which records, and what most likely caused it."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        groups = np.concatenate(batches)
        with torch.no_grad():
            culprits = [
                int(group)
                for group in groups
                if not math.isfinite(self._policy_sum(self._batch(group[None])))
            ]
        if len(culprits) == len(groups) > 1:
            names = f"all {len(groups)} of the update"
        else:
            names = ", ".join(source_names(self.store, culprits)) or "no single record"
        return (
            f"update {step}: {', '.join(bad)} not finite; stopped before the weights changed "
            f"(records: {names}). {self._likely_cause(values['lr'])}"
        )

    def _likely_cause(self, rate: float) -> str:
        if not self.recent:
            return "No update was done yet, so the model or these records cause it"
        before = ", ".join(f"{row['grad_norm']:.3g}" for row in self.recent)
        losses = ", ".join(f"{row['loss']:.3g}" for row in self.recent)
        return (
            f"The last updates had gradient norms {before} and losses {losses} at learning rates "
            f"up to {max(row['lr'] for row in self.recent):.3g} (now {rate:.3g}): the usual cause "
            f"is a learning rate that is too high, so try --lr {self.config.lr / 10:.3g}"
        )

    def _policy_sum(self, batch: Batch) -> float:
        with self._autocast():
            return float(batch.targets.sums(completion_logps(self.policy, batch)).sum())

    def _maybe_save(self, step: int, updates: int, signal: int | None) -> None:
        every = self.config.save_every
        due = every > 0 and step % every == 0 and step < updates
        if due or (signal and step < updates):
            self.save(step)
        if signal and step < updates:
            raise RunInterruptedError(
                signal, f"saved update {step} in {self._checkpoints}; --resume goes on from it"
            )

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.output) / CHECKPOINTS

    def save(self, step: int) -> Path:
        """Publish a checkpoint after update `step`.

        Raises:
            SaveError: it cannot be written; earlier ones are as they were.
        """
        at = checkpoint.Position(step, self.identity)
        try:
            return checkpoint.save(self._checkpoints, self.policy, self.optimizer, at)
        except OSError as error:
            last = checkpoint.newest(self._checkpoints)
            kept = (
                f"{last} is whole: make room, then --resume goes on from it"
                if last
                else "there is none before it"
            )
            raise SaveError(
                f"the checkpoint of update {step} could not be saved ({error}); {kept}"
            ) from error

    def _resume(self) -> int:
        folder = self._checkpoints
        at, refused = checkpoint.load_newest(folder, self.policy, self.optimizer, self.identity)
        for sentence in refused:
            say(f"passed over a damaged checkpoint: {sentence}")
        if at is None:
            say(f"{folder}: no checkpoint yet, so the run begins at its beginning")
            return 0
        say(f"{folder}: goes on after update {at.step:,}")
        return at.step


def _place(micro: MicroBatch) -> tuple[int, int]:
    return micro.epoch, micro.update


def _report(advance: Advance, groups: int, values: dict[str, float]) -> None:
    note = f"loss {values['loss']:.4f}"
    if "rewards/accuracies" in values:
        note += f" acc {values['rewards/accuracies']:.2f} margin {values['rewards/margins']:.3f}"
    advance(groups, note)
