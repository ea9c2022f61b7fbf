"""From a configuration to a trained model on disk."""

import json
import math
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from logratio import __version__
from logratio.bundle import TOKENIZER_FILES
from logratio.durable import sync
from logratio.forecast import Forecast, check_writable
from logratio.logps.attention import shared_prompts
from logratio.logps.checks import choose_layout
from logratio.logps.completion import transformer
from logratio.training import checkpoint, threads
from logratio.training.activation_budget import settle
from logratio.training.activations import Kept, keeping
from logratio.training.cached import cached_reference
from logratio.training.config import PrecomputeConfig, TrainConfig
from logratio.training.demand import training_forecast
from logratio.training.fingerprint import model_fingerprint
from logratio.training.interrupt import interrupts
from logratio.training.loop import CHECKPOINTS, Loop, say
from logratio.training.models import ADAPTER_CONFIG, autocast, default_device, quietly
from logratio.training.reference import holds_sums_only, undisturbed
from logratio.training.reference_pass import Precompute
from logratio.training.setup import (
    SETTINGS_FILE,
    Dataset,
    beta_of,
    build_policy,
    build_reference,
    check_config,
    check_groups,
    check_mix,
    load_dataset,
)
from logratio.training.shares import share_of

STORE_FILE = "train.store"
REFUSED_FILE = "refused.jsonl"
MODEL_FILES = ("config.json", ADAPTER_CONFIG, "model.safetensors.index.json")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        output: folder of the trained model, which `from_pretrained` opens.
        steps: updates done.
        history: one row of metrics per update of this process.
    """

    output: Path
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)


def train(config: TrainConfig, *, show_progress: bool = True) -> TrainResult:
    """Train a policy on preferences, or on demonstrations with `loss="sft"`.

    Returns:
        The folder that now holds the model, and the metrics of every update.

    Raises:
        ConfigError, ModelFolderError, OutputError, BadDataError: before anything long.
        StaleCacheError: the cache does not hold this reference's log-probs of this data.
        UntrustedReferenceError: the reference is not what its fingerprint says.
        NonFiniteError: a loss was not finite; names the records.
        RunInterruptedError: after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    return prepare(config, show_progress=show_progress).run()


def prepare(config: TrainConfig, *, show_progress: bool = True) -> "Training":
    """Check the settings and tokenize the data; nothing long has started."""
    check_config(config)
    if not config.resume:
        checkpoint.refuse_leftovers(Path(config.output) / CHECKPOINTS)
    path = Path(config.output) / STORE_FILE
    is_sft = config.loss == "sft"
    dataset = load_dataset(
        config.model,
        config.data,
        config.rules,
        replace(config.formats, demonstrations=is_sft, kinds=None if is_sft else ("pair",)),
        path=path,
        refused=path.with_name(REFUSED_FILE),
        max_bad_fraction=config.max_bad_fraction,
        show_progress=show_progress,
    )
    # The map keeps it while the run needs it, and nothing can leave it behind.
    path.unlink(missing_ok=True)
    roles = ("demonstration",) if is_sft else ("chosen", "rejected")
    check_groups(dataset.store, roles, f"the loss {config.loss}")
    check_mix(config.mix, dataset.store)
    return Training(config, dataset, show_progress)


class Training:
    """A run that is ready to start."""

    def __init__(self, config: TrainConfig, dataset: Dataset, show_progress: bool) -> None:
        self.config, self.dataset, self.show_progress = config, dataset, show_progress
        self.store = dataset.store
        self.device = default_device(config.device)
        self.cached = None if config.precompute else cached_reference(config, dataset.store)
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
            read_mode=config.read_mode,
            precision=config.precision,
            device=config.device,
            rules=config.rules,
            formats=config.formats,
            max_bad_fraction=config.max_bad_fraction,
        )
        return Precompute(wanted, self.dataset, share_of("1/1", {}), self.show_progress)

    @property
    def _has_sums_only(self) -> bool:
        fingerprint = model_fingerprint(
            self.config.reference or self.config.model, self.config.precision
        )
        return holds_sums_only(str(self.config.cache), fingerprint)

    def run(self) -> TrainResult:
        """Train, save, and return what was reached."""
        check_writable(Path(self.config.output), self.forecast.disk_bytes)
        if slow := threads.advice(self.device):
            say(slow)
        if self._pass is not None:
            self._pass.run()
            self.cached = cached_reference(self.config, self.store)
        torch.manual_seed(self.config.seed)
        policy = build_policy(self.config, str(self.device))
        reference = self.cached or build_reference(self.config, policy)
        with autocast(self.config.precision, self.device), undisturbed(policy):
            layout, reason = choose_layout(policy)
        if layout == "padded":
            say(f"padded layout (slower, never wrong): {reason}")
        loop = Loop(self.config, self.store, policy, reference, layout)
        with _attention(policy, layout), keeping(policy, self._kept(loop)):
            steps, history = loop.run(self.updates, self.show_progress)
        with interrupts():  # what was trained is saved first
            save_policy(policy, self.config, self.dataset)
            shutil.rmtree(Path(self.config.output) / CHECKPOINTS, ignore_errors=True)
        return TrainResult(Path(self.config.output), steps, history)

    def _kept(self, loop: Loop) -> Kept:
        """Return what the policy's layers keep; says so where some are computed twice."""
        choice = settle(self.config, self.store, loop.policy, loop.layout, loop.state_bytes)
        if choice.reason:
            say(choice.reason)
        config = self.config
        return Kept(choice.layers, config.offload_activations, config.compile_layers)


def _attention(policy: nn.Module, layout: str) -> AbstractContextManager[None]:
    return shared_prompts(transformer(policy)) if layout == "shared" else nullcontext()


def save_policy(policy: nn.Module, config: TrainConfig, dataset: Dataset) -> None:
    """Write the model (or adapter), its tokenizer and the settings to the output folder.

    Everything is written beside the final files first and then renamed, so that a full disk
    leaves no half model.
    """
    output = Path(config.output)
    partial = output / ".saving"
    shutil.rmtree(partial, ignore_errors=True)
    with quietly():
        policy.save_pretrained(partial)  # type: ignore[operator]
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source := Path(config.model) / name).exists():
            shutil.copyfile(source, partial / name)
    settings = {"version": __version__, **asdict(config), "beta": beta_of(config)}
    (partial / SETTINGS_FILE).write_text(json.dumps(settings, indent=1, default=str))
    (partial / "data_report.json").write_text(json.dumps(dataset.report.to_dict(), indent=1))
    _publish(partial, output)


def _publish(partial: Path, output: Path) -> None:
    """Move the files into `output`, where no weights of an earlier run stay behind."""
    names = {path.name for path in partial.iterdir()}
    for name in names:
        sync(partial / name)
        (partial / name).replace(output / name)
    for stale in (*output.glob("*.safetensors"), *(output / name for name in MODEL_FILES)):
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    partial.rmdir()
    sync(output)
