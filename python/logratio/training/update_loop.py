"""The updates of a run: order, evaluations, checkpoints, callbacks, and the model at the end."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from logratio._rust import Store
from logratio.data.feed import Feed, FeedSettings, micro_batches
from logratio.data.store.load import datasets_of
from logratio.forecast import count
from logratio.logps.attention.interface import shared_prompts
from logratio.logps.batch import buffers_for, shape_for
from logratio.logps.checks import choose_layout, layout_note
from logratio.logps.completion import transformer
from logratio.progress import Advance, progress, say
from logratio.training import checkpoint, memory
from logratio.training.activations import LayerOptions, choose_checkpointing, layer_options
from logratio.training.callbacks import Callback, CallbackError, RunState
from logratio.training.checkpoint import Position, RunInterruptedError, interrupts
from logratio.training.checkpoint_folder import SaveError
from logratio.training.compile_trial import BATCHES, try_compiling
from logratio.training.config import TrainConfig
from logratio.training.dataset import Dataset
from logratio.training.drawing import Drawing
from logratio.training.held_out import EvaluationInterruptedError, HeldOut
from logratio.training.methods.method import NAME_OF_GROUP
from logratio.training.models import (
    training_budget,
)
from logratio.training.optimizers import state_bytes
from logratio.training.parallel.processes import Processes
from logratio.training.parallel.sharded_files import is_sharded, whole_weights
from logratio.training.parallel.shares import updates_of
from logratio.training.parallel.strategy import Whole
from logratio.training.reference import (
    FrozenReference,
    Reference,
    same_random_state,
)
from logratio.training.reference_checks import check_start
from logratio.training.run_checkpoints import RunCheckpoints
from logratio.training.run_file import record_settings
from logratio.training.run_folder import (
    CHECKPOINTS,
    RunEnd,
    TrainResult,
    evaluations_of,
    identity,
    save_run,
)
from logratio.training.schedule import RunLength, learning_rate
from logratio.training.selection import Selection
from logratio.training.stall_guard import StallGuard
from logratio.training.update import Load, Updater
from logratio.training.watching import Unwatched, Watch


class UpdateLoop:
    """The part of `DPOTrainer` that runs once data and models are there.

    Attributes:
        config: The settings.
        dataset: The tokenized groups, the outcome of every input row, and the tokenizer.
        store: The tokenized groups to train on.
        held_out: The evaluation of held-out groups, or None.
        device: The device to train on.
        processes: The processes of the run.
        callbacks: Called during the run.
        show_progress: Draw progress bars and print notes.
        length: The length of the run.
        updater: The model and its optimizer, once the run has begun.
    """

    config: TrainConfig
    dataset: Dataset
    store: Store
    held_out: HeldOut | None
    device: torch.device
    processes: Processes
    callbacks: tuple[Callback, ...]
    show_progress: bool
    length: RunLength

    def run_identity(self) -> dict[str, Any]:
        """Return what makes this run the same as another one: settings, models and data."""
        held_out = self.held_out.store if self.held_out else None
        return identity(self.config, self.store, held_out)

    @property
    def updates(self) -> int:
        """Number of updates in the whole run."""
        return self.length.updates

    def begin(
        self,
        policy: nn.Module,
        reference: Reference | None,
        layout: str,
        strategy: Whole | None = None,
        load: Load | None = None,
    ) -> None:
        """Prepare the updates of `policy`; `train` calls this before the first one.

        Args:
            policy: The model to train: all its parameters that require gradients.
            reference: The reference model of the log-ratios; None if the loss has none.
            layout: Batch layout: "shared", "tree" or "padded".
            strategy: How passes of the policy run; None: in this process alone.
            load: Returns the model that a function builds on a device, whole or in shards; None:
                whole.
        """
        config, store = self.config, self.store
        self.updater = Updater(
            config, store, policy, reference, layout, strategy, self.processes, load
        )
        self.checkpoints = RunCheckpoints(config, self.updater)
        self.guard = StallGuard.of(config.stall_timeout, self.device)
        self.identity = self.run_identity()
        self.state = RunState(self.config, self.updates, policy, self.dataset.tokenizer)
        self.selection = Selection(self.config.best_metric, self.config.early_stop)
        self._evaluations: list[dict[str, Any]] = []
        self.drawing = Drawing(
            Path(self.config.output), wanted=self.config.report and self.processes.is_first
        )

    def choose_layout(self, policy: nn.Module, reference: Reference | None) -> str:
        """Return the best layout that all models in memory support; print a note if slower."""
        models = [policy, *([reference.model] if isinstance(reference, FrozenReference) else [])]
        wanted = self.config.share_beginnings
        found = choose_layout(*models, share_beginnings=wanted)
        layout, reason = self.processes.from_first(lambda: found)
        if note := layout_note(layout, reason, share_beginnings=wanted):
            say(note)
        return layout

    def _kept(self) -> LayerOptions:
        """Choose how the policy's layers run; print a note if some are checkpointed."""
        name, updater, strategy = self.config.optimizer, self.updater, self.updater.strategy
        state = sum(p.numel() * state_bytes(name, p.dtype, p.device) for p in updater.parameters)
        with same_random_state(updater.policy):  # measuring draws the adapters' dropout
            choice = choose_checkpointing(
                self.config,
                self.store,
                updater.policy,
                updater.layout,
                state / strategy.shards,
                free=self._least_free(),
                gradient_shards=strategy.gradient_shards,
                per_prompt=self.processes.per_prompt,
            )
        if choice.reason:
            say(choice.reason)
        layers = self.processes.highest(choice.layers)
        wanted = self.config.compile_layers
        kept = LayerOptions(layers, self.config.offload_activations, compiled=wanted == "on")
        return self._try_compiling(kept) if wanted == "auto" else kept

    def _least_free(self) -> float:
        """Return the bytes available to the process that has the fewest; the same in all."""
        per_device = self.processes.per_host if self.device.type == "cpu" else 1
        free = int(memory.free_on(self.device) / per_device)
        return -self.processes.highest(-free)

    def _try_compiling(self, kept: LayerOptions) -> LayerOptions:
        """Time the layers with and without compilation; a resumed run keeps its first choice.

        Compiled layers round differently, so the choice is part of the run's identity.
        """
        config, updater, compiled = self.config, self.updater, None
        if config.resume:
            compiled = checkpoint.recorded(self._checkpoints, "compiled")
        if compiled is None:
            batches = micro_batches(self._feed_settings.plan(self.store, epoch=0))[:BATCHES]
            rounds = self.length.groups / sum(map(len, batches))
            verdict = try_compiling(updater.policy, kept, lambda: updater.rehearse(batches), rounds)
            say(f"--compile auto: {verdict.reason}")
            compiled = self.processes.from_first(lambda: verdict.compiled)
        self.identity["compiled"] = compiled
        return replace(kept, compiled=compiled)

    def run_updates(self) -> TrainResult:
        """Run all updates of a run that has begun: see `begin`."""
        policy, layout = self.updater.policy, self.updater.layout
        attention = nullcontext() if layout == "padded" else shared_prompts(transformer(policy))
        with attention, layer_options(policy, self._kept()):
            return self._updates()

    def _updates(self) -> TrainResult:
        """Run all updates after the last checkpoint, and the evaluations between them."""
        config, in_all = self.config, self.length.groups
        start = self.state.step = self._resume() if config.resume else 0
        done = min(start * config.batch_size, in_all)
        if self.processes.is_first:
            record_settings(config)
        if self.updater.reference is not None:
            self._check_start(self.updater.reference, is_first=start == 0)
        history = []
        with (
            self._watch() as watch,
            self.guard.watching(),
            interrupts() as received,
            self._progress(in_all, done) as advance,
        ):
            interrupted = self._agreed(received)
            feed = self._feed(start)
            self._per_epoch = feed.updates_per_epoch
            self.call("on_start")
            self._stop_if_exhausted()  # if the run was killed between this and the end
            self._evaluate(watch, interrupted)  # if a signal interrupted the last evaluation
            shares = updates_of(feed, self.processes, start, self.updates)
            with closing(shares):
                for step, (most, batches) in enumerate(shares, start + 1):
                    if self.state.stop_reason:
                        break
                    self._enter(f"during update {step:,}")
                    rate = learning_rate(config, step - 1, self.updates)
                    counted = watch.counted(self.guard.counted(batches))
                    values, groups = self.updater.update(step, rate, counted, most)
                    self.state.step, self.state.epoch = step, step / feed.updates_per_epoch
                    values["epoch"] = self.state.epoch
                    history.append(values)
                    self.state.log(values)
                    advance(groups, watch.updated(step, values))
                    self.call("on_update", MappingProxyType(values))
                    self._evaluate(watch, interrupted)
                    self._maybe_save(step, interrupted())
            self._enter("while a checkpoint was saved", patient=True)
            self.checkpoints.finish()
        return self._result(history)

    def _enter(self, phase: str, *, patient: bool = False) -> None:
        """Name what the run does now, for the message if it dies or is stuck."""
        self.processes.enter(phase)
        self.guard.enter(phase, patient=patient)

    def _watch(self) -> Unwatched:
        """Return what records the run: only the first process does."""
        if not self.processes.is_first:
            return Unwatched(self.processes)
        return Watch(self.state, self.dataset.report, self.drawing, self.processes)

    def _agreed(self, received: Callable[[], int | None]) -> Callable[[], int | None]:
        """Let a signal of any process count for all, at the next call that all make together."""

        def agreed() -> int | None:
            self.guard.moved()  # an evaluation asks after each batch
            return self.processes.highest(received() or 0) or None

        return agreed

    def _evaluate(self, watch: Unwatched, interrupted: Callable[[], int | None]) -> None:
        """Evaluate held-out groups if it is time, and keep the weights if they are the best.

        A signal ends the evaluation, which is repeated when the run is resumed.
        """
        step = self.state.step
        if self.held_out is None or not self._is_due(step):
            return
        self._enter(f"during the evaluation after update {step:,}", patient=True)
        try:
            result = self.held_out.evaluate(step, self.updater, interrupted)
        except EvaluationInterruptedError:
            return
        # Samples on two GPUs may differ, and all processes must choose the same.
        metrics = self.processes.from_first(lambda: result.metrics)
        if self.selection.note(step, metrics):
            self.checkpoints.save_best(step)
        watch.evaluated(result)
        if self.show_progress:
            say(result.to_text())
        self._evaluations.append(result.to_dict())
        self.state.log(result.metrics)
        self.call("on_evaluate", result)
        self._stop_if_exhausted()

    def _stop_if_exhausted(self) -> None:
        """End the run if `early_stop` evaluations in a row were not better than the best."""
        if self.selection.is_exhausted:
            best = f"the best {self.selection.metric} was after update {self.selection.best_step}"
            waited = count(self.selection.waited, "evaluation")
            self.state.stop(f"{waited} without improvement: {best}")

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation follows update `step` and has not been done."""
        if step in (0, self.selection.evaluated):
            return False
        is_last = step == self.updates or self.state.stop_reason is not None
        return is_last or step % (self.config.eval_every or self._per_epoch) == 0

    def call(self, method: str, *given: Any) -> None:
        """Call a method of every callback.

        Raises:
            CallbackError: A callback raised an exception; a checkpoint has been saved.
        """
        for callback in self.callbacks:
            try:
                getattr(callback, method)(self.state, *given)
            except Exception as error:
                can_save = self.processes.count == 1 and method not in ("on_end", "on_checkpoint")
                saved = can_save and self.save(self.state.step)
                where = f"; {saved} can be continued with --resume" if saved else ""
                name = f"{type(callback).__name__}.{method}"
                raise CallbackError(f"{name} raised {error!r}{where}") from error
        if self.callbacks and method != "on_end":
            reasons = self.processes.share(self.state.stop_reason)
            self.state.stop_reason = next(filter(None, reasons), None)

    def _result(self, history: list[dict[str, float]]) -> TrainResult:
        """Restore the best weights, if the run keeps them, and describe the run."""
        step, best = self.state.step, self.selection.best_step
        if best not in (None, step):
            self.checkpoints.load_best(best)
        if reason := self.state.stop_reason:
            say(f"stopped after update {step:,} of {self.updates:,}: {reason}")
        return TrainResult(
            Path(self.config.output),
            step,
            history,
            evaluations=self._evaluations,
            best_step=best,
            stop_reason=self.state.stop_reason,
        )

    def _feed(self, start: int) -> Feed:
        """Return the micro-batches after update `start`."""
        feed = Feed(
            self.store,
            self._feed_settings,
            epochs=self.length.epochs,
            rank=self.processes.data_rank,
            world_size=self.processes.data_count,
            allocate=buffers_for(self.updater.device),
        )
        feed.start_after(start)
        return feed

    @property
    def _feed_settings(self) -> FeedSettings:
        return FeedSettings(
            groups_per_update=self.config.batch_size,
            token_budget=training_budget(self.config) * self.processes.per_prompt,
            layout=self.updater.layout,
            seed=self.config.seed,
            weights=self.config.mix,
            datasets=datasets_of(self.store) if self.config.mix else None,
            attention_cost=self._attention_cost,
            **shape_for(self.updater.layout, self.updater.device),
        )

    @property
    def _attention_cost(self) -> float:
        """The cost of an attended pair of tokens in tokens, by which processes share an update."""
        if self.processes.data_count == 1:
            return 0.0
        text = transformer(self.updater.policy).config.get_text_config()
        return 1 / (6 * int(text.hidden_size))

    def _progress(self, in_all: int, done: int) -> AbstractContextManager[Advance]:
        noun = f"{NAME_OF_GROUP[self.updater.objective.data]}s"
        return progress(self.config.loss, in_all, noun, show=self.show_progress, done=done)

    def _check_start(self, reference: Reference, *, is_first: bool) -> None:
        """Run the start-up checks of the reference, and print their notes."""
        updater = self.updater
        objective = updater.objective if is_first else None
        found = check_start(
            *(self.config, self.store, updater.policy, reference, updater.layout, objective),
            self.dataset.tokenizer.stop_ids,
        )
        for note in found:
            say(note)

    def _maybe_save(self, step: int, signal: int | None) -> None:
        if folder := self.checkpoints.completed():
            self.call("on_checkpoint", folder)
        every = self.config.save_every
        if step == self.updates and not (self.held_out and self._is_due(step)):
            return
        if signal or (every > 0 and step % every == 0):
            self._enter(f"while the checkpoint of update {step:,} was saved", patient=True)
            folder = self.checkpoints.begin(self._position(step))
            if signal:
                folder = folder or self.checkpoints.finish()
            if folder:
                self.call("on_checkpoint", folder)
        if signal:
            raise RunInterruptedError(
                signal, f"saved update {step} in {self._checkpoints}; continue with --resume"
            )

    def _position(self, step: int) -> Position:
        memory = self.updater.objective.memory
        return Position(step, self.identity, self.selection.state(), memory)

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.output) / CHECKPOINTS

    def save(self, step: int) -> Path:
        """Write a checkpoint after update `step`, and return its folder.

        Raises:
            SaveError: The checkpoint cannot be written; earlier ones are unchanged.
        """
        return self.checkpoints.save(self._position(step))

    def _resume(self) -> int:
        at = self.checkpoints.resume(self.identity)
        if at is None:
            return 0
        if at.selection:
            self.selection.restore(at.selection)
        self.updater.objective.memory |= at.memory
        self._evaluations = [
            row for row in evaluations_of(Path(self.config.output)) if row["step"] <= at.step
        ]
        return at.step

    def save_model_of(self, result: TrainResult) -> None:
        """Save the model; if that fails, save a checkpoint so that --resume can save it later."""
        try:
            end = RunEnd(result.steps, result.best_step, result.stop_reason)
            self.updater.strategy.settle()
            policy, is_first = self.updater.policy, self.processes.is_first
            weights = whole_weights(policy, keep=is_first) if is_sharded(policy) else None
            if is_first:
                save_run(policy, self.config, self.dataset, self.identity, end, weights)
                shutil.rmtree(self._checkpoints, ignore_errors=True)
            self.processes.wait()
        except OSError as error:
            what = f"the model could not be saved ({error})"
            try:
                saved = self.save(result.steps)
            except SaveError as worse:
                raise SaveError(f"{what}, and {worse}") from error
            raise SaveError(
                f"{what}; {saved} holds the trained weights: free some disk space, then run again "
                "with --resume to save the model"
            ) from error
