"""From a configuration to a trained model on disk."""

import math
import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from logratio.errors import ConfigError
from logratio.forecast import Forecast, check_writable
from logratio.logps.attention.interface import shared_prompts
from logratio.logps.checks import LAYOUTS, choose_layout, layout_note
from logratio.logps.completion import transformer
from logratio.progress import say
from logratio.training import template_date, torch_settings
from logratio.training.activations import Kept, keeping, settle
from logratio.training.checkpoint import interrupts
from logratio.training.compile_trial import settle_compiling
from logratio.training.config import PrecomputeConfig, TrainConfig
from logratio.training.dataset import (
    Dataset,
    check_groups,
    check_mix,
    check_reference,
    load_dataset,
)
from logratio.training.fingerprint import model_fingerprint
from logratio.training.loop import Loop, SaveError
from logratio.training.memory import training_forecast
from logratio.training.models import autocast, default_device, precision_note, precision_of
from logratio.training.policy import build_policy
from logratio.training.precomputation import Precompute, refuse_several, share_of
from logratio.training.reference import (
    FrozenReference,
    Reference,
    build_reference,
    cache_folder,
    cached_reference,
    holds_sums_only,
    sums_folder,
    undisturbed,
)
from logratio.training.run_folder import (
    CHECKPOINTS,
    claimed,
    finished_run,
    history_of,
    identity,
    refuse_another,
    save_run,
    scratch,
)
from logratio.training.torch_settings import (
    ask_for_expandable_segments,
    exact_products,
    fixed_order,
)
from logratio.training.validation import check_config
from logratio.validation import check_kind

STORE_FILE = "train.store"
REFUSED_FILE = "refused.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        output: folder of the trained model, which `from_pretrained` opens.
        steps: updates done.
        history: one row of metrics per update of this process; of all updates where the run had
            finished before.
        was_finished: an earlier run with the same settings had made it, and nothing was done.
    """

    output: Path
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    was_finished: bool = False


def train(config: TrainConfig, *, show_progress: bool = True) -> TrainResult:
    """Train a policy on preferences, or on demonstrations with `loss="sft"`.

    Returns:
        The folder that now holds the model, and the metrics of every update.

    Raises:
        ConfigError, ModelFolderError, OutputError, BadDataError: before anything long.
        RunExistsError: the output folder holds another run, and `overwrite` is not set.
        StaleCacheError: the cache does not hold this reference's log-probs of this data.
        UntrustedReferenceError: the reference is not what its fingerprint says.
        NonFiniteError: a loss was not finite; names the records.
        RunInterruptedError: after Ctrl-C or SIGTERM, with a checkpoint saved.
        SaveError: the model or a checkpoint could not be written; what was saved before is as it
            was.
    """
    ready = prepare(config, show_progress=show_progress)
    if show_progress:
        say(precision_note(config))
    return ready.run()


def prepare(
    config: TrainConfig, *, show_progress: bool = True, dry_run: bool = False
) -> "Training":
    """Check the settings and tokenize the data; nothing long has started.

    Until the run has ended, no other process can train into the output folder.

    Args:
        config: of the run.
        show_progress: draw a bar.
        dry_run: create nothing; what is returned has a forecast and cannot run.
    """
    check_kind(config, TrainConfig)
    refuse_several("train")
    ask_for_expandable_segments(config.device)
    check_config(config)
    if config.rules.date is None:
        config = replace(config, rules=replace(config.rules, date=template_date.of_run(config)))
    with ExitStack() as held:
        if not dry_run:
            held.enter_context(claimed(Path(config.output)))
        finished = finished_run(config)
        if finished:
            refuse_another(config, finished, identity(config))
        dataset = _read(config, show_progress, keeps=not (dry_run or finished))
        config = replace(config, rules=dataset.tokenizer.rules)
        if finished:
            refuse_another(config, finished, identity(config, dataset.store))
            steps, output = int(finished["steps"]), Path(config.output)
            done = TrainResult(output, steps, history_of(output, steps), was_finished=True)
            return Training(config, dataset, show_progress, None, done)
        return Training(config, dataset, show_progress, None if dry_run else held.pop_all())


def _read(config: TrainConfig, show_progress: bool, *, keeps: bool) -> Dataset:
    """Tokenize the data; `keeps`: list the refused rows in the output folder."""
    is_sft = config.loss == "sft"
    with nullcontext(Path(config.output)) if keeps else scratch() as folder:
        path = folder / STORE_FILE
        dataset = load_dataset(
            config.model,
            config.data,
            config.rules,
            replace(config.formats, demonstrations=is_sft, kinds=None if is_sft else ("pair",)),
            path=path,
            refused=folder / REFUSED_FILE,
            max_bad_fraction=config.max_bad_fraction,
            show_progress=show_progress,
            recorded_date=lambda: _date_of_cache(config),
        )
        # The map keeps it while the run needs it, and nothing can leave it behind.
        path.unlink(missing_ok=True)
    roles = ("demonstration",) if is_sft else ("chosen", "rejected")
    check_groups(dataset.store, roles, f"the loss {config.loss}")
    check_mix(config.mix, dataset.store)
    if config.reference:
        check_reference(config.reference, config.model, dataset.tokenizer, dataset.store)
    return dataset


def _date_of_cache(config: TrainConfig) -> str | None:
    if config.cache is None:
        return None
    reference = model_fingerprint(config.reference or config.model, precision_of(config))
    folders = cache_folder(config.cache, reference), sums_folder(config.cache, reference)
    return max(filter(None, map(template_date.of_cache, folders)), default=None)


class Training:
    """A run that is ready to start.

    Attributes:
        finished: what an earlier run with the same settings left, where there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        show_progress: bool,
        held: ExitStack | None,
        finished: "TrainResult | None" = None,
    ) -> None:
        self.config, self.dataset, self.show_progress = config, dataset, show_progress
        self.store, self.finished, self._held = dataset.store, finished, held
        self.device = default_device(config.device)
        self.cached = (
            None if config.precompute or finished else cached_reference(config, dataset.store)
        )
        self.updates = config.epochs * math.ceil(len(self.store) / config.batch_size)

    @cached_property
    def forecast(self) -> Forecast:
        """What the run will need, with the pass that fills the cache if one is asked for."""
        run = training_forecast(self.config, self.store)
        if self._pass is None:
            return run
        before = self._pass.forecast
        return replace(
            run,
            memory_bytes=max(run.memory_bytes, before.memory_bytes),
            disk_bytes=run.disk_bytes + before.disk_bytes,
            seconds=run.seconds + before.seconds,
            notes=f"{run.notes}; {before.notes}",
        )

    @cached_property
    def _pass(self) -> Precompute | None:
        """The reference's pass over this data, where the cache is to be filled first."""
        if not self.config.precompute:
            return None
        config = self.config
        wanted = PrecomputeConfig(
            config.reference or config.model,
            config.data,
            str(config.cache),
            sums_only=self._has_sums_only,
            share_beginnings=config.share_beginnings,
            read_mode=config.read_mode,
            precision=precision_of(config),
            device=config.device,
            rules=config.rules,
            formats=config.formats,
            max_bad_fraction=config.max_bad_fraction,
        )
        return Precompute(wanted, self.dataset, share_of("1/1", {}), self.show_progress)

    @property
    def _has_sums_only(self) -> bool:
        fingerprint = model_fingerprint(
            self.config.reference or self.config.model, precision_of(self.config)
        )
        return holds_sums_only(str(self.config.cache), fingerprint)

    def run(self) -> TrainResult:
        """Train, save, and return what was reached; at once where an earlier run had finished."""
        if self.finished:
            say(f"{self.finished.output}: already finished with these settings")
            return self.finished
        if self._held is None:
            raise ConfigError("this was prepared as a dry run, which never runs")
        fixed = fixed_order(self.device, wanted=self.config.deterministic)
        with self._held, exact_products(), fixed:
            return self._run()

    def _run(self) -> TrainResult:
        output = Path(self.config.output)
        check_writable(output, self.forecast.disk_bytes)
        if self.config.overwrite:
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        if slow := torch_settings.advice(self.device):
            say(slow)
        if self._pass is not None:
            self._pass.run()
            self.cached = cached_reference(self.config, self.store)
        torch.manual_seed(self.config.seed)
        policy = build_policy(self.config, str(self.device))
        reference = self.cached or build_reference(self.config, policy)
        with autocast(precision_of(self.config), self.device), undisturbed(policy):
            layout = self._layout(policy, reference)
        loop = Loop(self.config, self.store, policy, reference, layout)
        with _attention(policy, layout), keeping(policy, self._kept(loop)):
            steps, history = loop.run(self.updates, self.show_progress)
        with interrupts():  # what was trained is saved first
            self._save(loop, steps)
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return TrainResult(output, steps, history)

    def _layout(self, policy: nn.Module, reference: Reference | None) -> str:
        """Return the layout that all models in memory can have; say so where it is slower."""
        models = [policy, *([reference.model] if isinstance(reference, FrozenReference) else [])]
        wanted = self.config.share_beginnings
        found = [choose_layout(model, share_beginnings=wanted) for model in models]
        layout, reason = min(found, key=lambda one: LAYOUTS.index(one[0]))
        if told := layout_note(layout, reason, share_beginnings=wanted):
            say(told)
        return layout

    def _save(self, loop: Loop, steps: int) -> None:
        """Save the model; where that fails, a checkpoint from which it can be saved later."""
        try:
            save_run(loop.policy, self.config, self.dataset, loop.identity, steps)
        except OSError as error:
            what = f"the model could not be saved ({error})"
            try:
                saved = loop.save(steps)
            except SaveError as worse:
                raise SaveError(f"{what}, and {worse}") from error
            raise SaveError(
                f"{what}; {saved} holds all that was trained: make room, then --resume saves the "
                "model"
            ) from error

    def _kept(self, loop: Loop) -> Kept:
        """Return how the policy's layers are run; says so where some are computed twice."""
        choice = settle(self.config, self.store, loop.policy, loop.layout, loop.state_bytes)
        if choice.reason:
            say(choice.reason)
        wanted = self.config.compile_layers
        kept = Kept(choice.layers, self.config.offload_activations, compiled=wanted == "on")
        return settle_compiling(loop, kept, self.updates) if wanted == "auto" else kept


def _attention(policy: nn.Module, layout: str) -> AbstractContextManager[None]:
    return nullcontext() if layout == "padded" else shared_prompts(transformer(policy))
