"""The trainer: from a configuration to a trained model on disk.

Each update covers a fixed number of groups, regardless of the micro-batch size: see `DPOTrainer`.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from logratio.data.feed import Feed, FeedSettings, MicroBatch, micro_batches
from logratio.data.readers.inputs import Inputs
from logratio.data.store.load import datasets_of
from logratio.errors import ConfigError
from logratio.forecast import Forecast, check_writable, count
from logratio.logps.attention.interface import shared_prompts
from logratio.logps.batch import buffers_for, shape_for
from logratio.logps.checks import choose_layout, layout_note
from logratio.logps.completion import transformer
from logratio.progress import progress, say
from logratio.training import checkpoint, run_folder, torch_settings
from logratio.training.activations import LayerOptions, choose_checkpointing, layer_options
from logratio.training.callbacks import Callback, CallbackError, RunState, check_callbacks
from logratio.training.checkpoint import RunInterruptedError, SaveError, interrupts
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
from logratio.training.policy import build_policy
from logratio.training.precomputation import Precompute, pass_of_run, refuse_multiple_processes
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
from logratio.training.trainer_methods import TransformersMethods
from logratio.training.update import Updater
from logratio.training.validation import check_folders, check_settings, reference_kind
from logratio.training.watching import Watch
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


class DPOTrainer(TransformersMethods):
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
        **settings: Other fields of `TrainConfig`, under their logratio, transformers or TRL names
            (without `output`, the folder is named after the model, such as "Qwen3-0.6B-DPO");
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
        callbacks: Callback | Sequence[Callback] | None = (),
        show_progress: bool = True,
        dry_run: bool = False,
        **settings: Any,
    ) -> None:
        given = {"model": model, "data": data, "reference": reference} | settings
        config, self._models = trainer_arguments(given, tokenizer, peft_config, config)
        refuse_multiple_processes("train")
        ask_for_expandable_segments(config.device)
        check_settings(config)
        check_metric(config)
        config = with_local_models(config)
        check_folders(config)
        config = run_folder.with_date(config)
        self.show_progress, self.dry_run = show_progress, dry_run
        self.callbacks = check_callbacks(callbacks)
        self.device = default_device(config.device)
        with ExitStack() as unlocking:
            if not dry_run:
                self._lock = OutputLock(Path(config.output))
                unlocking.callback(self._lock.release)
            self._prepare(config)
            if not self.finished:
                unlocking.pop_all()

    def _prepare(self, config: TrainConfig) -> None:
        """Read the data, and look for a finished run and a filled cache."""
        finished = finished_run(config)
        if finished:
            refuse_different_run(config, finished, identity(config))
        self.dataset = load_training_data(
            config,
            refused=None if self.dry_run or finished else Path(config.output) / REFUSED_FILE,
            show_progress=self.show_progress,
            recorded_date=lambda: _date_of_cache(config),
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
            self.config, self.dataset, writes=writes, show_progress=self.show_progress
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
        passes = [pass_of_run(config, self.dataset, config.data, self.show_progress)]
        if self._data.dataset and config.eval_data is not None:
            held = self._data.dataset
            passes.append(pass_of_run(config, held, config.eval_data, self.show_progress))
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
            self.result = self.finished
            return self.finished
        if self.dry_run:
            raise ConfigError("this trainer was created with dry_run=True and cannot train")
        fixed = fixed_order(self.device, wanted=self.config.deterministic)
        with self._lock.training(), exact_products(), fixed:
            return self._train()

    def _train(self) -> TrainResult:
        output = Path(self.config.output)
        check_writable(output, self.forecast.disk_bytes)
        if self.config.overwrite:
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        if slow := torch_settings.advice(self.device):
            say(slow)
        for before in self._passes:
            before.run()
        if self._passes:
            self._open_cache()
        torch.manual_seed(self.config.seed)
        policy = build_policy(self.config, str(self.device))
        reference = self.cached or build_reference(self.config, policy)
        with autocast(precision_of(self.config), self.device), side_effect_free(policy):
            layout = self._choose_layout(policy, reference)
        self.begin(policy, reference, layout)
        with _attention(policy, layout), layer_options(policy, self._kept()):
            result = self._run_updates()
        with interrupts():  # a signal must not prevent saving the trained model
            self._save_model(result)
            shutil.rmtree(self._checkpoints, ignore_errors=True)
        self._call("on_end", result)
        self._drawing.finish()
        self.result = result
        return result

    def begin(self, policy: nn.Module, reference: Reference | None, layout: str) -> None:
        """Prepare the updates of `policy`; `train` calls this before the first one.

        Args:
            policy: The model to train: all its parameters that require gradients.
            reference: The reference model of the log-ratios; None if the loss has none.
            layout: Batch layout: "shared", "tree" or "padded".
        """
        self.updater = Updater(self.config, self.store, policy, reference, layout)
        self.identity = self._identity()
        self.state = RunState(self.config, self.updates, policy, self.dataset.tokenizer)
        self.selection = Selection(self.config.best_metric, self.config.early_stop)
        self._evaluations: list[dict[str, Any]] = []
        self._drawing = Drawing(Path(self.config.output), wanted=self.config.report)

    def _choose_layout(self, policy: nn.Module, reference: Reference | None) -> str:
        """Return the best layout that all models in memory support; print a note if slower."""
        models = [policy, *([reference.model] if isinstance(reference, FrozenReference) else [])]
        wanted = self.config.share_beginnings
        layout, reason = choose_layout(*models, share_beginnings=wanted)
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
        wanted = self.config.compile_layers
        kept = LayerOptions(choice.layers, self.config.offload_activations, compiled=wanted == "on")
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
            compiled = verdict.compiled
        self.identity["compiled"] = compiled
        return replace(kept, compiled=compiled)

    def _run_updates(self) -> TrainResult:
        """Run all updates after the last checkpoint, and the evaluations between them."""
        config, in_all = self.config, self._length.groups
        start = self.state.step = self._resume() if config.resume else 0
        done = min(start * config.batch_size, in_all)
        record_settings(config)
        if self.updater.reference is not None:
            self._check_start(self.updater.reference, is_first=start == 0)
        history = []
        with (
            Watch(self.state, self.dataset.report, self._drawing) as watch,
            interrupts() as interrupted,
            progress(config.loss, in_all, "pairs", show=self.show_progress, done=done) as advance,
        ):
            feed = self._feed(start)
            self._per_epoch = feed.updates_per_epoch
            self._call("on_start")
            self._stop_if_exhausted()  # if the run was killed between this and the end
            self._evaluate(watch, interrupted)  # if a signal interrupted the last evaluation
            with closing(iter(feed)) as batches:
                # With max_steps the data may go on after the last update.
                wanted = islice(groupby(batches, _place), self.updates - start)
                for step, (_, update) in enumerate(wanted, start + 1):
                    if self.state.stop_reason:
                        break
                    rate = learning_rate(config, step - 1, self.updates)
                    values, groups = self.updater.update(step, rate, watch.counted(update))
                    self.state.step, self.state.epoch = step, step / feed.updates_per_epoch
                    values["epoch"] = self.state.epoch
                    history.append(values)
                    self.state.log(values)
                    advance(groups, watch.updated(step, values))
                    self._call("on_update", MappingProxyType(values))
                    self._evaluate(watch, interrupted)
                    self._maybe_save(step, interrupted())
        return self._result(history)

    def _evaluate(self, watch: Watch, interrupted: Callable[[], int | None]) -> None:
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
            checkpoint.save_best(self._checkpoints, self.updater.policy, step)
        watch.evaluated(result)
        if self.show_progress:
            say(result.to_text())
        self._evaluations.append(result.to_dict())
        self.state.log(result.metrics)
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
                saved = method not in ("on_end", "on_checkpoint") and self.save(self.state.step)
                where = f"; {saved} can be continued with --resume" if saved else ""
                name = f"{type(callback).__name__}.{method}"
                raise CallbackError(f"{name} raised {error!r}{where}") from error

    def _result(self, history: list[dict[str, float]]) -> TrainResult:
        """Restore the best weights, if the run keeps them, and describe the run."""
        step, best = self.state.step, self.selection.best_step
        if best not in (None, step):
            checkpoint.load_best(self._checkpoints, self.updater.policy, best)
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
            **shape_for(self.updater.layout, self.updater.device),
        )

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
        every = self.config.save_every
        if step == self.updates and not (self.held_out and self._is_due(step)):
            return
        if signal or (every > 0 and step % every == 0):
            self._call("on_checkpoint", self.save(step))
        if signal:
            raise RunInterruptedError(
                signal, f"saved update {step} in {self._checkpoints}; continue with --resume"
            )

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.output) / CHECKPOINTS

    def save(self, step: int) -> Path:
        """Write a checkpoint after update `step`, and return its folder.

        Raises:
            SaveError: The checkpoint cannot be written; earlier ones are unchanged.
        """
        at = checkpoint.Position(step, self.identity, self.selection.state())
        updater, keep = self.updater, self.config.keep_checkpoints
        return checkpoint.save(self._checkpoints, updater.policy, updater.optimizer, at, keep)

    def _resume(self) -> int:
        folder = self._checkpoints
        at, refused = checkpoint.load_newest(
            folder, self.updater.policy, self.updater.optimizer, self.identity
        )
        for sentence in refused:
            say(f"skipped a damaged checkpoint: {sentence}")
        if at is None:
            say(f"{folder}: no checkpoint yet, starting from the first update")
            return 0
        say(f"{folder}: resuming after update {at.step:,}")
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
            save_run(self.updater.policy, self.config, self.dataset, self.identity, end)
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


def _place(micro: MicroBatch) -> tuple[int, int]:
    return micro.epoch, micro.update
