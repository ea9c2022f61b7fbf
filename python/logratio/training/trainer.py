"""The trainer: from a configuration to a trained model on disk.

Each update covers a fixed number of groups, regardless of the micro-batch size: see `DPOTrainer`.
"""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logratio.data.readers.inputs import Inputs
from logratio.data.tokenization import chat_template as clock
from logratio.errors import ConfigError
from logratio.forecast import Forecast, check_writable, count
from logratio.progress import be_silent, say
from logratio.training import run_folder, torch_settings
from logratio.training.callbacks import Callback, check_callbacks
from logratio.training.checkpoint import interrupts
from logratio.training.config import TrainConfig, with_local_models
from logratio.training.dataset import load_training_data
from logratio.training.fingerprint import reference_fingerprint
from logratio.training.given_model import is_in_memory
from logratio.training.held_out import HeldOut, check_metric, divide
from logratio.training.memory import training_forecast
from logratio.training.methods.method import NAME_OF_GROUP
from logratio.training.methods.notes import notes_of
from logratio.training.methods.objective import Objective
from logratio.training.models import (
    autocast,
    default_device,
    precision_note,
    precision_of,
)
from logratio.training.moving_reference import MovingReference
from logratio.training.parallel.agreement import refuse_differences, refuse_separate_outputs
from logratio.training.parallel.context import split_prompts
from logratio.training.parallel.division import SHARDED
from logratio.training.parallel.lifeline import ending_together
from logratio.training.parallel.placement import Placement
from logratio.training.parallel.processes import join_processes
from logratio.training.policy import REFERENCE, build_policy
from logratio.training.precomputation import Precompute, pass_of_run
from logratio.training.reference import (
    CachedReference,
    CachedSums,
    FrozenReference,
    Reference,
    build_reference,
    cache_folder,
    cached_reference,
    side_effect_free,
    sums_folder,
)
from logratio.training.run_folder import (
    OutputLock,
    TrainResult,
    finished_result,
    finished_run,
    identity,
    refuse_different_run,
)
from logratio.training.schedule import RunLength, warmup_updates
from logratio.training.torch_settings import (
    ask_for_expandable_segments,
    exact_products,
    fixed_order,
)
from logratio.training.trainer_arguments import trainer_arguments
from logratio.training.trainer_methods import TransformersMethods
from logratio.training.update_loop import UpdateLoop
from logratio.training.validation import check_folders, check_settings, reference_kind
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


class DPOTrainer(UpdateLoop, TransformersMethods):
    """Trains a policy on preferences, or on demonstrations with ``loss="sft"``.

    The constructor checks the settings, tokenizes the data and locks the output folder: until
    `train` returns, no other process can train into it. It does not load the model.

    Args:
        model: The model to start from: a folder (safetensors, tokenizer.json), an id of the
            Hugging Face hub, a `PreTrainedModel`, or a `PeftModel` with one LoRA adapter, which is
            trained further. An object is trained in place: its dropout is turned off, and it gets
            the device and the precision of the run.
        data: Preference data, as in `TrainConfig`.
        tokenizer: A fast tokenizer of transformers, a folder or an id. None: that of the model's
            folder or id.
        reference: The reference: a folder, an id or a `PreTrainedModel`, which is used without a
            copy. None: the model before its first update.
        eval_data: Held-out data, in the same forms as `data`; or set `eval_share`.
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
        eval_data: Inputs | None = None,
        peft_config: Any = None,
        config: Any = None,
        callbacks: Callback | Sequence[Callback] | None = (),
        show_progress: bool = True,
        dry_run: bool = False,
        **settings: Any,
    ) -> None:
        given = {"model": model, "data": data, "reference": reference, "eval_data": eval_data}
        given |= settings
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
            forecasts_only = dry_run and self.processes.count == 1
            self.processes.divide_prompts(1 if forecasts_only else config.context_parallel_size)
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
        today = self.processes.from_first(clock.today) if self.processes.hosts > 1 else None
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
        self.length = RunLength.of(config, len(self.store))
        self._check_length()
        if self.show_progress and not finished:
            for note in notes_of(self.store, Objective.of(config)):
                say(note)
        self.finished: TrainResult | None = None
        if finished:
            refuse_different_run(config, finished, self.run_identity())
            self.finished = finished_result(Path(config.output), finished)
        self.cached: CachedReference | CachedSums | None = None
        if not (config.precompute or finished):
            self._open_cache()

    def _check_length(self) -> None:
        """Refuse a run that ends during its warmup, or before its reference has changed."""
        if (warmup := warmup_updates(self.config, self.updates)) >= self.updates > 1:
            raise ConfigError(
                f"--warmup {self.config.warmup:g}: the learning rate rises for {warmup:,} updates, "
                f"and the run has {self.updates:,}: give fewer, or a share such as 0.1"
            )
        if self.config.lr_scheduler == "wsd" and self.config.decay > max(1, self.updates - warmup):
            raise ConfigError(
                f"--decay {self.config.decay:g}: the learning rate would fall for longer than the "
                f"{self.updates - warmup:,} updates after the warmup: give fewer, or a share"
            )
        every = self.config.reference_sync_steps
        if self.config.sync_reference and self.updates < every:
            raise ConfigError(
                f"--sync-reference changes the reference every {every} updates, and the run has "
                f"{self.updates}: set a smaller --reference-sync-steps"
            )

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

    def _open_cache(self) -> None:
        """Look all completions up in the cache, if the run has one."""
        self.cached = cached_reference(self.config, self.store)
        if self.cached and self.held_out:
            self.held_out.cached = self.cached.over(self.held_out.store)

    def __repr__(self) -> str:
        groups = NAME_OF_GROUP[Objective.of(self.config).data]
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
        if self.config.context_parallel_size > 1:
            run = replace(run, notes=f"{run.notes}; memory of one process, time of one that trains "
                          "alone")  # fmt: skip
        elif self.config.parallel != "auto" or self.processes.count > 1:
            alone = (
                "figures of one process that trains alone (--dry-run --world-size N: of several)"
            )
            run = replace(run, notes=f"{run.notes}; {alone}")
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
            kept = "; the model in memory is unchanged" if is_in_memory(self.config.model) else ""
            if reason := self.finished.stop_reason:
                kept += f"; it stopped after update {self.finished.steps:,}: {reason}"
            say(f"{self.finished.output}: a run with these settings has already finished{kept}")
            self.result = self.finished
            return self.finished
        if self.dry_run:
            raise ConfigError("this trainer was created with dry_run=True and cannot train")
        fixed = fixed_order(self.device, wanted=self.config.deterministic)
        lock = self._lock.training() if self.processes.is_first else nullcontext()
        try:
            with self._together(), lock, exact_products(), fixed:
                return self._train()
        finally:
            for given in self._models:
                given.remove_copy(REFERENCE)

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
        reference = self.cached or self._reference(policy, placement)
        strategy = placement.strategy(policy)
        with autocast(precision_of(self.config), self.device), side_effect_free(policy):
            layout = self.choose_layout(policy, reference)
        self.begin(policy, reference, layout, strategy, placement.load)
        with split_prompts(self.updater):
            result = self.run_updates()
        self._enter("while the model was saved", patient=True)
        with self.guard.watching():
            with interrupts():  # a signal must not prevent saving the trained model
                self.save_model_of(result)
            self.call("on_end", result)
        self.drawing.finish()
        self.result = result
        return result

    def _reference(self, policy: nn.Module, placement: Placement) -> Reference | None:
        """Load the reference of a run without a cache."""
        config, found = self.config, build_reference(self.config, policy, placement.load)
        if not (config.sync_reference and isinstance(found, FrozenReference)):
            return found
        every, share = config.reference_sync_steps, config.reference_mixup_alpha
        return MovingReference(found.model, every, share)

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
        refuse_differences(self.processes, self.run_identity(), self.store)


def _date_of_cache(config: TrainConfig) -> str | None:
    if config.cache is None:
        return None
    reference = reference_fingerprint(config)
    folders = cache_folder(config.cache, reference), sums_folder(config.cache, reference)
    return max(filter(None, map(run_folder.date_of_cache, folders)), default=None)
