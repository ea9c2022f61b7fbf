"""The trainer: from a configuration to a trained model on disk.

Each update covers a fixed number of groups, regardless of the micro-batch size: see `DPOTrainer`.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from logratio.data.feed import Feed, FeedSettings, micro_batches
from logratio.data.readers.inputs import Inputs
from logratio.data.store.load import datasets_of
from logratio.errors import ConfigError
from logratio.forecast import Forecast, check_writable, count
from logratio.logps.attention.interface import shared_prompts
from logratio.logps.batch import buffers_for, shape_for
from logratio.logps.checks import choose_layout, layout_note
from logratio.logps.completion import transformer
from logratio.progress import be_silent, progress, say
from logratio.training import checkpoint, run_folder, torch_settings
from logratio.training.activations import LayerOptions, choose_checkpointing, layer_options
from logratio.training.callbacks import Callback, CallbackError, RunState, check_callbacks
from logratio.training.checkpoint import Position, RunInterruptedError, interrupts
from logratio.training.checkpoint_folder import SaveError
from logratio.training.compile_trial import BATCHES, try_compiling
from logratio.training.config import TrainConfig
from logratio.training.dataset import load_training_data
from logratio.training.drawing import Drawing
from logratio.training.fingerprint import reference_fingerprint
from logratio.training.given_model import given_model
from logratio.training.held_out import EvaluationInterruptedError, HeldOut, check_metric, divide
from logratio.training.memory import training_forecast
from logratio.training.models import (
    autocast,
    default_device,
    precision_note,
    precision_of,
    training_budget,
    with_local_models,
)
from logratio.training.optimizers import state_bytes
from logratio.training.parallel.agreement import refuse_differences, refuse_separate_outputs
from logratio.training.parallel.lifeline import ending_together
from logratio.training.parallel.placement import SHARDED, Placement
from logratio.training.parallel.processes import join_processes
from logratio.training.parallel.sharded_files import is_sharded, whole_weights
from logratio.training.parallel.shares import updates_of
from logratio.training.parallel.strategy import Whole
from logratio.training.policy import build_policy
from logratio.training.precomputation import Precompute, pass_of_run
from logratio.training.reference import (
    CachedReference,
    CachedSums,
    FrozenReference,
    Reference,
    build_reference,
    cache_folder,
    cached_reference,
    same_random_state,
    side_effect_free,
    sums_folder,
)
from logratio.training.reference_checks import check_start
from logratio.training.run_checkpoints import RunCheckpoints
from logratio.training.run_file import record_settings
from logratio.training.run_folder import (
    CHECKPOINTS,
    OutputLock,
    RunEnd,
    TrainResult,
    evaluations_of,
    finished_result,
    finished_run,
    identity,
    refuse_different_run,
    save_run,
)
from logratio.training.schedule import RunLength, learning_rate
from logratio.training.selection import Selection
from logratio.training.torch_settings import (
    ask_for_expandable_segments,
    exact_products,
    fixed_order,
)
from logratio.training.trainer_arguments import trainer_arguments
from logratio.training.update import Load, Updater
from logratio.training.validation import check_folders, check_settings, reference_kind
from logratio.training.watching import Unwatched, Watch
from logratio.validation import check_kind

REFUSED_FILE = "refused.jsonl"


def train(config: TrainConfig, *, show_progress: bool = True) -> TrainResult:
    """Train a policy: `DPOTrainer(config=config).train()`.

    Args:
        config: Settings of the run.
        show_progress: Draw progress bars and print notes.

    Returns:
        The folder of the trained model and the metrics of every update.

    Raises:
        LogratioError: As raised by `DPOTrainer` and `DPOTrainer.train`.
    """
    check_kind(config, TrainConfig)
    trainer = DPOTrainer(config=config, show_progress=show_progress)
    if show_progress:
        say(precision_note(config))
    return trainer.train()


class DPOTrainer:
    """Trains a policy on preferences, or on demonstrations with ``loss="sft"``.

    The constructor checks the settings, tokenizes the data and locks the output folder: until
    `train` returns, no other process can train into it. It does not load the model.

    Args:
        model: The model to start from: a folder (safetensors, tokenizer.json), an id of the
            Hugging Face hub, a `PreTrainedModel`, or a `PeftModel` whose adapter is new. An object
            is trained in place: its dropout is turned off, and it gets the device and the precision
            of the run.
        data: Preference data, as in `TrainConfig`.
        tokenizer: A fast tokenizer of transformers, a folder or an id. None: that of the model's
            folder or id.
        reference: The reference: a folder, an id or a `PreTrainedModel`, which is used without a
            copy. None: the model before its first update.
        peft_config: A `LoraConfig` of peft, in place of `lora`.
        config: All settings at once, instead of `model`, `data` and `settings`; or a `DPOConfig`
            of TRL, whose fields become settings or are refused by name.
        callbacks: Called during the run: see `Callback`.
        show_progress: Draw progress bars and print notes.
        dry_run: Create no files. The trainer then offers a forecast but cannot train.
        **settings: Other fields of `TrainConfig`, under their logratio, transformers or TRL names;
            also TRL's arguments `args`, `processing_class`, `ref_model` and `train_dataset`.

    Attributes:
        config: The settings; `rules` holds the rules that the data was tokenized with.
        dataset: The tokenized groups, the outcome of every input row, and the tokenizer.
        store: The tokenized groups to train on.
        held_out: The evaluation of held-out groups; None without `eval_data` and `eval_share`.
        device: The device to train on.
        updates: Number of updates in the whole run.
        finished: The result of an earlier run with the same settings, or None.

    Raises:
        ConfigError, ModelFolderError, OutputError, BadDataError: A setting, model folder, output
            folder or data row is invalid.
        RunExistsError: The output folder holds another run, and `overwrite` is not set.
        StaleCacheError: The cache lacks this reference's log-probs of this data.

    Example:
        >>> trainer = DPOTrainer("sft-model", "pairs.jsonl", output="policy", beta=0.1)
        >>> trainer.train()
        TrainResult('policy', 1,250 updates, loss 0.4127, rewards/accuracies 0.8125)
    """

    def __init__(
        self,
        model: Any = None,
        data: Inputs | None = None,
        *,
        tokenizer: Any = None,
        reference: Any = None,
        peft_config: Any = None,
        config: Any = None,
        callbacks: Sequence[Callback] = (),
        show_progress: bool = True,
        dry_run: bool = False,
        **settings: Any,
    ) -> None:
        given = {"model": model, "data": data, "reference": reference} | settings
        config, self._models = trainer_arguments(given, tokenizer, peft_config, config)
        self.processes = join_processes()
        if not self.processes.is_first:
            be_silent()
            show_progress = False
        self.show_progress, self.dry_run = show_progress, dry_run
        self.callbacks = check_callbacks(callbacks)
        with self._together(), ExitStack() as unlocking:
            ask_for_expandable_segments(config.device)
            check_settings(config)
            check_metric(config)
            config = with_local_models(config)
            check_folders(config)
            config = run_folder.with_date(config)
            self.device = default_device(config.device)
            if not dry_run and self.processes.is_first:
                self._lock = OutputLock(Path(config.output))
                unlocking.callback(self._lock.release)
            self.processes.enter("while reading the data")
            self._prepare(config)
            if not self.finished:
                unlocking.pop_all()

    def _together(self) -> AbstractContextManager[None]:
        """Return a context that ends all processes of the run if this one fails in it."""
        return ending_together(self.processes.lifeline, self.processes.rank)

    def _prepare(self, config: TrainConfig) -> None:
        """Read the data, and look for a finished run and a filled cache."""
        finished = self.processes.from_first(lambda: finished_run(config))
        if finished:
            refuse_different_run(config, finished, identity(config))
        output = None if self.dry_run or finished else Path(config.output)
        # Clocks of several hosts may be on two sides of midnight.
        today = (
            self.processes.from_first(date.today().isoformat) if self.processes.hosts > 1 else None
        )
        self.dataset = load_training_data(
            config,
            refused=output / REFUSED_FILE if output and self.processes.is_first else None,
            show_progress=self.show_progress,
            recorded_date=lambda: _date_of_cache(config) or today,
            folder=output,
            processes=self.processes,
        )
        self.config = config = replace(config, rules=self.dataset.tokenizer.rules)
        self.held_out = self._divide(writes=not (self.dry_run or finished))
        self._length = RunLength.of(config, len(self.store))
        self.updates = self._length.updates
        self.finished: TrainResult | None = None
        if finished:
            refuse_different_run(config, finished, self._identity())
            self.finished = finished_result(Path(config.output), finished)
        self.cached: CachedReference | CachedSums | None = None
        if not (config.precompute or finished):
            self._open_cache()

    def _divide(self, *, writes: bool) -> HeldOut | None:
        """Set the groups to train on; return the evaluation of the held-out ones, if any."""
        self._data = divide(
            self.config,
            self.dataset,
            writes=writes,
            show_progress=self.show_progress,
            processes=self.processes,
        )
        self.store = self._data.train
        if self._data.held_out is None:
            return None
        if self.show_progress:
            trained = count(len(self.store), "group")
            say(f"{trained} to train on, {len(self._data.held_out):,} held out")
        return HeldOut(self.config, self._data.held_out, self.dataset.tokenizer)

    def _identity(self) -> dict[str, Any]:
        return identity(self.config, self.store, self._data.held_out)

    def _open_cache(self) -> None:
        """Look all completions up in the cache, if the run has one."""
        self.cached = cached_reference(self.config, self.store)
        if self.cached and self.held_out:
            self.held_out.cached = self.cached.over(self.held_out.store)

    def __repr__(self) -> str:
        groups = "demonstration" if self.config.loss == "sft" else "pair"
        kind = reference_kind(self.config)
        reference = "" if kind == "none" else f", {kind} reference"
        return (
            f"DPOTrainer({self.config.loss}, {count(len(self.store), groups)}, "
            f"{count(self.updates, 'update')}{reference}, {self.device})"
        )

    @cached_property
    def forecast(self) -> Forecast:
        """Memory, disk space and time of the run, including the precompute pass if requested."""
        run = training_forecast(self.config, self.store, self._data.held_out)
        for before in (one.forecast for one in self._passes):
            run = replace(
                run,
                memory_bytes=max(run.memory_bytes, before.memory_bytes),
                disk_bytes=run.disk_bytes + before.disk_bytes,
                seconds=run.seconds + before.seconds,
                notes=f"{run.notes}; {before.notes}",
            )
        return run

    @cached_property
    def _passes(self) -> list[Precompute]:
        """The passes over the data and `eval_data` that fill the cache before training."""
        config = self.config
        if not config.precompute:
            return []
        shown, processes = self.show_progress, self.processes
        passes = [pass_of_run(config, self.dataset, config.data, shown, processes)]
        if self._data.dataset and config.eval_data is not None:
            held = self._data.dataset
            passes.append(pass_of_run(config, held, config.eval_data, shown, processes))
        return passes

    def train(self) -> TrainResult:
        """Train and save the model. Returns at once if an earlier run has already finished.

        Returns:
            The folder of the trained model, and the metrics of every update.

        Raises:
            UntrustedReferenceError: The reference's log-probs do not match its fingerprint.
            NonFiniteError: A loss was not finite; the message names the records.
            RunInterruptedError: Ctrl-C or SIGTERM was received; a checkpoint has been saved.
            SaveError: The model or a checkpoint could not be written; files saved earlier are
                unchanged.
        """
        if self.finished:
            kept = "; the model in memory is unchanged" if given_model(self.config.model) else ""
            if reason := self.finished.stop_reason:
                kept += f"; it stopped after update {self.finished.steps:,}: {reason}"
            say(f"{self.finished.output}: a run with these settings has already finished{kept}")
            return self.finished
        if self.dry_run:
            raise ConfigError("this trainer was created with dry_run=True and cannot train")
        fixed = fixed_order(self.device, wanted=self.config.deterministic)
        lock = self._lock.training() if self.processes.is_first else nullcontext()
        with self._together(), lock, exact_products(), fixed:
            return self._train()

    def _train(self) -> TrainResult:
        self._meet()
        for before in self._passes:
            before.run()
        self.processes.wait()
        if self._passes:
            self._open_cache()
        self.processes.enter("while the model was loaded")
        placement = Placement(self.config, self.processes, self.device)
        torch.manual_seed(self.config.seed)
        policy = placement.load(lambda device: build_policy(self.config, device))
        reference = self.cached or build_reference(self.config, policy, placement.load)
        strategy = placement.strategy(policy)
        with autocast(precision_of(self.config), self.device), side_effect_free(policy):
            layout = self._choose_layout(policy, reference)
        self.begin(policy, reference, layout, strategy, placement.load)
        with _attention(policy, layout), layer_options(policy, self._kept()):
            result = self._run_updates()
        self.processes.enter("while the model was saved")
        with interrupts():  # a signal must not prevent saving the trained model
            self._save_model(result)
        self._call("on_end", result)
        self._drawing.finish()
        return result

    def _meet(self) -> None:
        """Check what can stop the run before expensive work; create the group of processes."""
        output = Path(self.config.output)
        if self.processes.is_first:
            check_writable(output, self.forecast.disk_bytes)
            if self.config.overwrite:
                shutil.rmtree(self._checkpoints, ignore_errors=True)
        if slow := torch_settings.advice(self.device):
            say(slow)
        refuse_separate_outputs(self.processes, output)
        self.processes.start_group(self.device, even_alone=self.config.parallel in SHARDED)
        refuse_differences(self.processes, self._identity(), self.store)

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
        self.identity = self._identity()
        self.state = RunState(self.config, self.updates, policy, self.dataset.tokenizer)
        self.selection = Selection(self.config.best_metric, self.config.early_stop)
        self._evaluations: list[dict[str, Any]] = []
        self._drawing = Drawing(Path(self.config.output), wanted=self.config.report)

    def _choose_layout(self, policy: nn.Module, reference: Reference | None) -> str:
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
        name, updater = self.config.optimizer, self.updater
        state = sum(p.numel() * state_bytes(name, p.dtype, p.device) for p in updater.parameters)
        with same_random_state(updater.policy):  # measuring draws the adapters' dropout
            choice = choose_checkpointing(
                self.config, self.store, updater.policy, updater.layout, state
            )
        if choice.reason:
            say(choice.reason)
        layers = self.processes.highest(choice.layers)
        wanted = self.config.compile_layers
        kept = LayerOptions(layers, self.config.offload_activations, compiled=wanted == "on")
        return self._try_compiling(kept) if wanted == "auto" else kept

    def _try_compiling(self, kept: LayerOptions) -> LayerOptions:
        """Time the layers with and without compilation; a resumed run keeps its first choice.

        Compiled layers round differently, so the choice is part of the run's identity.
        """
        config, updater, compiled = self.config, self.updater, None
        if config.resume:
            compiled = checkpoint.recorded(self._checkpoints, "compiled")
        if compiled is None:
            batches = micro_batches(self._feed_settings.plan(self.store, epoch=0))[:BATCHES]
            rounds = self._length.groups / sum(map(len, batches))
            verdict = try_compiling(updater.policy, kept, lambda: updater.rehearse(batches), rounds)
            say(f"--compile auto: {verdict.reason}")
            compiled = self.processes.from_first(lambda: verdict.compiled)
        self.identity["compiled"] = compiled
        return replace(kept, compiled=compiled)

    def _run_updates(self) -> TrainResult:
        """Run all updates after the last checkpoint, and the evaluations between them."""
        config, in_all = self.config, self._length.groups
        start = self.state.step = self._resume() if config.resume else 0
        done = min(start * config.batch_size, in_all)
        if self.processes.is_first:
            record_settings(config)
        if self.updater.reference is not None:
            self._check_start(self.updater.reference, is_first=start == 0)
        history = []
        with (
            self._watch() as watch,
            interrupts() as received,
            progress(config.loss, in_all, "pairs", show=self.show_progress, done=done) as advance,
        ):
            interrupted = self._agreed(received)
            feed = self._feed(start)
            self._per_epoch = feed.updates_per_epoch
            self._call("on_start")
            self._stop_if_exhausted()  # if the run was killed between this and the end
            self._evaluate(watch, interrupted)  # if a signal interrupted the last evaluation
            shares = updates_of(feed, self.processes, start, self.updates)
            with closing(shares):
                for step, (most, batches) in enumerate(shares, start + 1):
                    if self.state.stop_reason:
                        break
                    self.processes.enter(f"during update {step:,}")
                    rate = learning_rate(config, step - 1, self.updates)
                    counted = watch.counted(batches)
                    values, groups = self.updater.update(step, rate, counted, most)
                    self.state.step, self.state.epoch = step, step / feed.updates_per_epoch
                    values["epoch"] = self.state.epoch
                    history.append(values)
                    advance(groups, watch.updated(step, values))
                    self._call("on_update", MappingProxyType(values))
                    self._evaluate(watch, interrupted)
                    self._maybe_save(step, interrupted())
            self.checkpoints.finish()
        return self._result(history)

    def _watch(self) -> Unwatched:
        """Return what records the run: only the first process does."""
        if not self.processes.is_first:
            return Unwatched(self.processes)
        return Watch(self.state, self.dataset.report, self._drawing, self.processes)

    def _agreed(self, received: Callable[[], int | None]) -> Callable[[], int | None]:
        """Let a signal of any process count for all, at the next call that all make together."""
        return lambda: self.processes.highest(received() or 0) or None

    def _evaluate(self, watch: Unwatched, interrupted: Callable[[], int | None]) -> None:
        """Evaluate held-out groups if it is time, and keep the weights if they are the best.

        A signal ends the evaluation, which is repeated when the run is resumed.
        """
        step = self.state.step
        if self.held_out is None or not self._is_due(step):
            return
        try:
            result = self.held_out.evaluate(step, self.updater, interrupted)
        except EvaluationInterruptedError:
            return
        if self.selection.note(step, result.metrics):
            self.checkpoints.save_best(step)
        watch.evaluated(result)
        if self.show_progress:
            say(result.to_text())
        self._evaluations.append(result.to_dict())
        self._call("on_evaluate", result)
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

    def _call(self, method: str, *given: Any) -> None:
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
            epochs=self._length.epochs,
            rank=self.processes.rank,
            world_size=self.processes.count,
            allocate=buffers_for(self.updater.device),
        )
        feed.start_after(start)
        return feed

    @property
    def _feed_settings(self) -> FeedSettings:
        return FeedSettings(
            groups_per_update=self.config.batch_size,
            token_budget=training_budget(self.config),
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
        if self.processes.count == 1:
            return 0.0
        text = transformer(self.updater.policy).config.get_text_config()
        return 1 / (6 * int(text.hidden_size))

    def _check_start(self, reference: Reference, *, is_first: bool) -> None:
        """Run the start-up checks of the reference, and print their note if they have one."""
        updater = self.updater
        objective = updater.objective if is_first else None
        note = check_start(
            self.config, self.store, updater.policy, reference, updater.layout, objective
        )
        if note:
            say(note)

    def _maybe_save(self, step: int, signal: int | None) -> None:
        if folder := self.checkpoints.completed():
            self._call("on_checkpoint", folder)
        every = self.config.save_every
        if step == self.updates and not (self.held_out and self._is_due(step)):
            return
        if signal or (every > 0 and step % every == 0):
            folder = self.checkpoints.begin(self._position(step))
            if signal:
                folder = folder or self.checkpoints.finish()
            if folder:
                self._call("on_checkpoint", folder)
        if signal:
            raise RunInterruptedError(
                signal, f"saved update {step} in {self._checkpoints}; continue with --resume"
            )

    def _position(self, step: int) -> Position:
        return Position(step, self.identity, self.selection.state())

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
        self._evaluations = [
            row for row in evaluations_of(Path(self.config.output)) if row["step"] <= at.step
        ]
        return at.step

    def _save_model(self, result: TrainResult) -> None:
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


def _date_of_cache(config: TrainConfig) -> str | None:
    if config.cache is None:
        return None
    reference = reference_fingerprint(config)
    folders = cache_folder(config.cache, reference), sums_folder(config.cache, reference)
    return max(filter(None, map(run_folder.date_of_cache, folders)), default=None)


def _attention(policy: nn.Module, layout: str) -> AbstractContextManager[None]:
    return nullcontext() if layout == "padded" else shared_prompts(transformer(policy))
