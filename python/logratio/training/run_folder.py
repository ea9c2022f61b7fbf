"""The output folder of a run: locking, the finished run in it, its settings and its date.

A folder with `training.json` and without checkpoints contains a finished run. A folder with
checkpoints contains an unfinished run, even if the model of an earlier run is still in it.

Some chat templates write the current date into every prompt, so token ids would differ on the next
day: every cache lookup would miss, and no run could be resumed. Commands therefore continue with
the date that was recorded when the work started (`TokenizationRules.date`).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from logratio import __version__
from logratio._rust import Store
from logratio.bundle import TOKENIZER_FILES
from logratio.cache.identity import read_conditions, record_conditions
from logratio.data.store.turn_weights import data_digest
from logratio.durable import finalize, locked, sync, system_errors
from logratio.errors import ConfigError, LogratioError
from logratio.forecast import OutputError, count
from logratio.progress import say
from logratio.report.run_files import (
    DATA_REPORT_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    SETTINGS_FILE,
)
from logratio.training import checkpoint
from logratio.training.config import UNRECORDED, LoraSettings, PathLike, TrainConfig
from logratio.training.dataset import Dataset
from logratio.training.fingerprint import model_fingerprint
from logratio.training.given_model import base_names, source_of
from logratio.training.methods.objective import Objective, named_methods
from logratio.training.model_card import Made, write_card
from logratio.training.models import (
    ADAPTER_CONFIG,
    precision_of,
    quietly,
    training_budget,
)
from logratio.training.policy import save_weights
from logratio.training.router_loss import router_coefficient
from logratio.training.run_info import resolved_settings, versions
from logratio.training.validation import beta_of

CHECKPOINTS = "checkpoints"
SAVING = ".saving"
MODEL_FILES = ("config.json", ADAPTER_CONFIG, "model.safetensors.index.json")
_COMPARED = (
    *("loss", "lr", "warmup", "max_grad_norm", "batch_size"),
    *("epochs", "optimizer", "compile_layers", "seed", "deterministic", "mix"),
    *("share_beginnings", *(name for name in UNRECORDED if name != "eval_data")),
)


class RunExistsError(LogratioError, FileExistsError):
    """The output folder contains a run that would be lost, or another process is using it."""


def identity(
    config: TrainConfig, store: Store | None = None, held_out: Store | None = None
) -> dict[str, Any]:
    """Return the settings that must be equal for two runs to count as the same run.

    Args:
        config: Settings of the run.
        store: Data of the run, whose digest is included; None: without the data.
        held_out: Held-out data of the run, or None; its digest is included with that of `store`.

    Returns:
        Values after a round trip through JSON, that is, with lists instead of tuples.
    """
    fields = {name: getattr(config, name) for name in _COMPARED}
    # Earlier versions recorded a bool, before "auto" existed.
    compiled = config.compile_layers
    fields["compile_layers"] = compiled if compiled == "auto" else compiled == "on"
    models = {
        name: model_fingerprint(folder, precision_of(config), config.quantization).digest.hex()
        for name, folder in (
            ("model", config.model),
            ("reference", config.reference or config.model),
        )
    }
    own = {
        "date": config.rules.date,
        "token_budget": training_budget(config),
        "beta": beta_of(config),
        "precision": precision_of(config),
        "router_aux_loss_coef": router_coefficient(config),
        "lora": _shape_of(config.lora) if config.lora else None,
    }
    own |= _options(Objective.of(config))
    held = data_digest(held_out) if held_out else None
    data = {"data": data_digest(store), "eval_data": held} if store else {}
    plain: dict[str, Any] = json.loads(json.dumps(fields | models | own | data))
    return plain


def _options(objective: Objective) -> dict[str, Any]:
    """Return the options of a run's methods; two have names of their own in earlier versions."""
    first = {name: value for term in objective.terms for name, value in term.options.items()}
    own = {"label_smoothing": first.pop("label_smoothing", 0.0), "gamma": first.pop("gamma", 1.0)}
    others = {f"{term.name}.{n}": v for term in objective.terms for n, v in term.options.items()
              if n in first}  # fmt: skip
    return own | ({"loss_options": others} if others else {})


def _shape_of(lora: LoraSettings) -> dict[str, Any]:
    """Return the settings of adapters; those that the first version did not record if not default.

    So a run of the first version and a run with the same settings count as the same.
    """
    first = {"rank", "alpha", "targets"}
    return {
        name: value
        for name, value in asdict(lora).items()
        if name in first or value != getattr(LoraSettings, name)
    }


def settings_of(folder: PathLike) -> dict[str, Any] | None:
    """Read the training settings of the model in `folder`; None if it has no `training.json`.

    Raises:
        ConfigError: `training.json` is damaged.
    """
    path = Path(folder) / SETTINGS_FILE
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): delete it or restore it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object: delete it or restore it")
    return found


def finished_run(config: TrainConfig) -> dict[str, Any] | None:
    """Return the settings of the finished run in the output folder; None if there is none.

    Raises:
        RunExistsError: The folder contains an unfinished run, and neither `resume` nor `overwrite`
            is set.
        ConfigError: The folder is that of the input model, or contains a model from elsewhere.
    """
    output = Path(config.output)
    for folder in (config.model, config.reference or config.model):
        if output.resolve() == source_of(folder).resolve():
            raise ConfigError(f"--output {output} is the folder of an input model; choose another")
    settings, left = settings_of(output), checkpoint.newest(output / CHECKPOINTS)
    is_ours = settings is not None or left or (output / SAVING).exists()
    if not is_ours and any(output.glob("*.safetensors")):
        raise ConfigError(
            f"--output {output} contains a model that logratio did not train; choose another"
        )
    if config.overwrite:
        return None
    if left:
        if config.resume:
            return None
        raise RunExistsError(
            f"{left.parent} contains {left.name} of an unfinished run: continue it with "
            "--resume, replace it with --overwrite, or choose another --output"
        )
    return settings


def refuse_different_run(
    config: TrainConfig, finished: dict[str, Any], now: dict[str, Any]
) -> None:
    """Refuse to replace a finished run by a different one.

    Args:
        config: Settings of the new run.
        finished: Settings of the finished run.
        now: Identity of the new run, as far as it is known.

    Raises:
        RunExistsError: The identities differ; the message names the settings.
    """
    before = finished.get("identity")
    if before is None:
        why = "from a version of logratio that did not record its identity"
    else:
        before = UNRECORDED | before
        names = checkpoint.differences(before, now)
        why = f"which differs in {names}" if names else ""
    if why:
        raise RunExistsError(
            f"{config.output} contains a finished run, {why}: choose another --output, or replace "
            "it with --overwrite"
        )


@contextmanager
def locked_output(output: Path) -> Iterator[Path]:
    """Create the output folder and lock it against other processes inside the block.

    A new folder in which the block leaves nothing is removed again.

    Raises:
        OutputError: The folder cannot be created.
        RunExistsError: Another process is training into it.
    """
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot write here ({error.strerror or error})") from error
    try:
        with locked(output):
            try:
                yield output
            finally:
                if is_new:
                    _remove_empty(output)
    except BlockingIOError as error:
        raise RunExistsError(
            f"{output}: another process is training into this folder; choose another --output"
        ) from error


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it has files, or is gone
        folder.rmdir()


class OutputLock:
    """A trainer's lock on its output folder, from its creation to the end of the training.

    Until the training begins, a newer trainer of this process takes the lock over: a notebook cell
    that is run again creates its trainer again.

    Raises:
        OutputError, RunExistsError: As raised by `locked_output`.
    """

    def __init__(self, output: Path) -> None:
        self._output = output.resolve()
        if older := _WAITING.pop(self._output, None):
            older.release()
        self._held = ExitStack()
        self._held.enter_context(locked_output(output))
        self._is_held = True
        _WAITING[self._output] = self

    def release(self) -> None:
        """Unlock the folder."""
        self._is_held = False
        self._held.close()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keep the lock during the block, and release it after it.

        Raises:
            RunExistsError: A newer trainer has taken the lock over.
        """
        if not self._is_held:
            raise RunExistsError(
                f"{self._output}: this trainer has trained already, or a newer one of this process "
                "has its folder: create it again"
            )
        _WAITING.pop(self._output, None)
        try:
            yield
        finally:
            self.release()


_WAITING: WeakValueDictionary[Path, OutputLock] = WeakValueDictionary()
"""Locks of trainers of this process whose training has not begun, by output folder."""


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        steps: Number of updates done.
        best_step: Number of updates of the saved model, if an earlier one was better.
        stop_reason: Why the run ended before its last update; None: it did not.
    """

    steps: int
    best_step: int | None = None
    stop_reason: str | None = None


def save_run(
    policy: nn.Module,
    config: TrainConfig,
    dataset: Dataset,
    ran: dict[str, Any],
    end: RunEnd,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the model or adapter, its tokenizer and the settings to the output folder.

    All files are written to a temporary folder and then renamed, so that on a full disk the model
    of an earlier run stays complete.

    Args:
        policy: The trained model.
        config: Settings of the run.
        dataset: Data of the run.
        ran: Identity of the run.
        end: How the run ended.
        weights: Whole weights by name, if those of `policy` are sharded.

    Raises:
        OSError: The files could not be written; nothing was changed.
    """
    output = Path(config.output)
    partial = output / SAVING
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quietly(), system_errors(output):
            save_weights(policy, partial, weights)
        _name_base(partial, Path(config.model))
        for name in (*TOKENIZER_FILES, "added_tokens.json", "generation_config.json"):
            if (source := Path(config.model) / name).exists():
                shutil.copyfile(source, partial / name)
        settings = {
            "version": __version__,
            **resolved_settings(config),
            **asdict(end),
            "identity": ran,
        }
        (partial / SETTINGS_FILE).write_text(json.dumps(settings, indent=1))
        (partial / DATA_REPORT_FILE).write_text(json.dumps(dataset.report.to_dict(), indent=1))
        write_card(_made(policy, config, dataset, end), partial, output)
        for path in partial.iterdir():
            finalize(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _publish(partial, output)


def _made(policy: nn.Module, config: TrainConfig, dataset: Dataset, end: RunEnd) -> Made:
    """Return what the model card says, with the evaluation of the saved model, if there is one."""
    step = end.best_step or end.steps
    rows = evaluations_of(Path(config.output))
    evaluation = next((row for row in reversed(rows) if row.get("step") == step), None)
    device = next(policy.parameters()).device
    return Made(config, dataset.report, step, end.stop_reason, evaluation, versions(device))


def _name_base(saved: Path, folder: Path) -> None:
    """Let a saved adapter name its base so that it is found from anywhere.

    peft would look up an id on the hub while saving, so it is written afterwards.
    """
    path = saved / ADAPTER_CONFIG
    if path.exists() and not (folder / ADAPTER_CONFIG).exists():
        settings = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(settings | base_names(folder), indent=2))


def _publish(partial: Path, output: Path) -> None:
    """Move the files to `output`, and delete weights of an earlier run."""
    names = sorted(path.name for path in partial.iterdir())
    # The old settings are deleted first and the new ones moved last, so that the settings never
    # describe the weights of a different run.
    (output / SETTINGS_FILE).unlink(missing_ok=True)
    for name in sorted(names, key=SETTINGS_FILE.__eq__):
        (partial / name).replace(output / name)
    for stale in (*output.glob("*.safetensors"), *(output / name for name in MODEL_FILES)):
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    partial.rmdir()
    sync(output)


def finished_result(output: Path, settings: Mapping[str, Any]) -> "TrainResult":
    """Return the result of a finished run, from its settings and the rows in its folder."""
    steps = int(settings["steps"])
    return TrainResult(
        output,
        steps,
        history_of(output, steps),
        was_finished=True,
        evaluations=evaluations_of(output),
        best_step=settings.get("best_step"),
        stop_reason=settings.get("stop_reason"),
    )


def evaluations_of(output: Path) -> list[dict[str, Any]]:
    """Read the evaluations of a run; empty if there are none."""
    try:
        lines = (output / EVALUATIONS_FILE).read_text().splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def history_of(output: Path, steps: int) -> list[dict[str, float]]:
    """Read the metrics of a finished run; empty if those of some updates are missing."""
    try:
        lines = (output / METRICS_FILE).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        whole = [row.pop("step") for row in rows] == [*range(1, steps + 1)]
    except (OSError, ValueError, KeyError):
        return []
    return rows if whole else []


def reward_beta(policy: PathLike, given: float | None) -> float:
    """Return β of a policy's reward: `given`, or β of the run that trained the policy.

    Prints a note if the two differ.

    Args:
        policy: Folder of the trained model or adapter.
        given: β from the user, or None.

    Raises:
        ConfigError: No β is given or recorded in the folder.
    """
    path, settings = Path(policy) / SETTINGS_FILE, settings_of(policy)
    trained = _trained_beta(settings) if settings else None
    if given is not None:
        if trained is not None and given != trained:
            say(f"using beta {given}; the policy was trained with {trained} ({path})")
        return given
    if trained is None:
        give = "give --beta, the reward per nat of log-ratio"
        if not settings:
            raise ConfigError(f"{path} does not exist: {give}, with the value of the training")
        loss = settings.get("loss")
        raise ConfigError(
            f"{policy} was trained with {loss}, a loss without a reference: {give}, or export it "
            "with --reference none, for the reward of that training"
        )
    return trained


def note_unfinished(policy: PathLike) -> None:
    """Print a note if a model's folder also contains a run that has not finished."""
    if newest := checkpoint.newest(Path(policy) / CHECKPOINTS):
        say(
            f"{policy}: contains {newest.name} of a run that has not finished; this is the model "
            "of an earlier run. Continue the run with --resume to replace it"
        )


def _trained_beta(settings: dict[str, Any]) -> float | None:
    """Return a run's β if its loss has a reference, else None."""
    beta = settings.get("beta")
    try:
        methods = [method for method, _ in named_methods(settings.get("loss", "")).values()]
    except ConfigError:  # a loss of the user's own that cannot be imported here
        return None
    weighs = any(method.needs_reference and method.rewards == "implicit" for method in methods)
    return float(beta) if weighs and isinstance(beta, int | float) else None


_FIELD = "date"


def date_of_run(config: TrainConfig) -> str | None:
    """Return the date of the run in the output folder that this run resumes or repeats."""
    if config.overwrite:
        return None
    newest = checkpoint.newest(Path(config.output) / CHECKPOINTS)
    if newest is None:
        return date_of_policy(config.output)
    try:
        state = json.loads((newest / "state.json").read_text("utf-8"))
        return _date_field(state["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged checkpoint is reported when it is loaded


def with_date(config: TrainConfig) -> TrainConfig:
    """Return the settings with the date of the run in the output folder, unless they have one."""
    if config.rules.date is not None:
        return config
    return replace(config, rules=replace(config.rules, date=date_of_run(config)))


def date_of_policy(folder: PathLike) -> str | None:
    """Return the date in the prompts of the run that trained a model, or None."""
    rules = (settings_of(folder) or {}).get("rules")
    return _date_field(rules) if isinstance(rules, Mapping) else None


def date_of_store(store: Store) -> str | None:
    """Return the date in the prompts of a store, or None."""
    rules = json.loads(store.metadata or "{}").get("rules")
    return _date_field(rules) if isinstance(rules, Mapping) else None


def date_of_cache(folder: Path) -> str | None:
    """Return the latest date with which a cache folder was filled, or None."""
    return max(dates_of_cache(folder), default=None)


def dates_of_cache(folder: Path) -> list[str]:
    """Return all dates with which a cache folder was filled, ascending."""
    return sorted({date for fields in read_conditions(folder) if (date := _date_field(fields))})


def record_date(folder: Path, date: str | None) -> None:
    """Record the date with which a cache folder is filled, if the prompts contain one."""
    if date:
        record_conditions(folder, {_FIELD: date})


def date_miss(folder: Path, date: str | None) -> str:
    """Describe the dates of a cache if they may explain missing completions; else return ""."""
    others = [other for other in dates_of_cache(folder) if other != date]
    if not date or not others:
        return ""
    return (
        f". The chat template writes the date into prompts, here {date}, and the cache was filled "
        f"with {', '.join(others)}: give --date {others[-1]} to read it"
    )


def _date_field(fields: Mapping[str, Any]) -> str | None:
    found = fields.get(_FIELD)
    return found if isinstance(found, str) else None


_SHOWN = ("loss", "rewards/accuracies", "eval_loss", "eval_rewards/accuracies")


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        output: Folder of the trained model, readable with `from_pretrained`.
        steps: Number of updates of the whole run.
        history: One dict of metrics per update done by this process; metrics of all updates if
            the run had already finished.
        was_finished: True if an earlier run with the same settings had already produced the
            model, so no training was done.
        evaluations: The rows of `evaluations.jsonl`: one per evaluation of held-out data.
        best_step: Number of updates of the saved model with `best_metric`; else None.
        stop_reason: Why the run ended before its last update; None: it did not.
    """

    output: Path
    steps: int
    history: list[dict[str, float]] = field(default_factory=list)
    was_finished: bool = False
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    stop_reason: str | None = None

    def __repr__(self) -> str:
        last = self.history[-1] if self.history else {}
        if self.evaluations:
            last = last | self.evaluations[-1]
        figures = "".join(f", {name} {last[name]:.4g}" for name in _SHOWN if name in last)
        state = "already finished, " if self.was_finished else ""
        counted = count(self.steps, "update")
        return f"TrainResult({str(self.output)!r}, {state}{counted}{figures})"
