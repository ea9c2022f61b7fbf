"""The folder of a run: who may write to it, what has finished in it, what that was trained with.

A folder with `training.json` and without checkpoints holds a finished run. One with checkpoints
holds a run that did not end, whatever model of an earlier run is still there.

A chat template with a clock writes today's date into every prompt, so that all ids differ tomorrow:
a cache would miss, and a run could not be resumed. So a command continues under the date that was
recorded when the work began (`TokenizationRules.date`).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from logratio import __version__
from logratio._rust import Store
from logratio.bundle import TOKENIZER_FILES
from logratio.cache.identity import read_conditions, record_conditions
from logratio.durable import finalize, locked, sync, system_errors
from logratio.errors import ConfigError, LogratioError
from logratio.forecast import OutputError
from logratio.progress import say
from logratio.training import checkpoint
from logratio.training.config import PathLike, TrainConfig
from logratio.training.dataset import Dataset
from logratio.training.fingerprint import model_fingerprint
from logratio.training.losses import PAIR_LOSSES
from logratio.training.metrics import METRICS_FILE
from logratio.training.models import ADAPTER_CONFIG, precision_of, quietly, training_budget
from logratio.training.validation import beta_of

SETTINGS_FILE = "training.json"
DATA_REPORT_FILE = "data_report.json"
CHECKPOINTS = "checkpoints"
SAVING = ".saving"
MODEL_FILES = ("config.json", ADAPTER_CONFIG, "model.safetensors.index.json")
_COMPARED = (
    *("loss", "label_smoothing", "gamma", "lr", "warmup", "max_grad_norm", "batch_size"),
    *("epochs", "optimizer", "compile_layers", "seed", "deterministic", "mix"),
    "share_beginnings",
)


class RunExistsError(LogratioError, FileExistsError):
    """The output folder holds a run that would be lost, or is another process's."""


def identity(config: TrainConfig, store: Store | None = None) -> dict[str, Any]:
    """Return what must be equal for two runs to be the same run; of the data where `store` is it.

    The values are as JSON gives them back: lists, no tuples.
    """
    fields = {name: getattr(config, name) for name in _COMPARED}
    # As runs recorded it when there were two choices.
    compiled = config.compile_layers
    fields["compile_layers"] = compiled if compiled == "auto" else compiled == "on"
    models = {
        name: model_fingerprint(folder, precision_of(config)).digest.hex()
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
        "lora": asdict(config.lora) if config.lora else None,
    }
    data = {"data": store.digest} if store else {}
    plain: dict[str, Any] = json.loads(json.dumps(fields | models | own | data))
    return plain


def settings_of(folder: PathLike) -> dict[str, Any] | None:
    """Read the settings of the run that made a model; None where no run made it.

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
        raise ConfigError(f"{path} is no JSON object: delete it or restore it")
    return found


def finished_run(config: TrainConfig) -> dict[str, Any] | None:
    """Return the settings of the finished run in the output folder, or None where there is none.

    Raises:
        RunExistsError: it holds a run that did not end, and it is not said what becomes of it.
        ConfigError: it is the model's own folder, or holds a model that no run made.
    """
    output = Path(config.output)
    for folder in (config.model, config.reference or config.model):
        if output.resolve() == Path(folder).resolve():
            raise ConfigError(f"output {output} is the model's own folder; name another")
    settings, left = settings_of(output), checkpoint.newest(output / CHECKPOINTS)
    is_ours = settings is not None or left or (output / SAVING).exists()
    if not is_ours and any(output.glob("*.safetensors")):
        raise ConfigError(f"output {output} holds a model that was not made here; name another")
    if config.overwrite:
        return None
    if left:
        if config.resume:
            return None
        raise RunExistsError(
            f"{left.parent} holds {left.name} of a run that did not end: continue it with "
            "--resume, replace it with --overwrite, or name another --output"
        )
    return settings


def refuse_another(config: TrainConfig, finished: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to replace a finished run by one that differs from it in some of `now`.

    Raises:
        RunExistsError: names the settings that differ.
    """
    before = finished.get("identity")
    if before is None:
        why = "made by a version of logratio that did not record what to compare it by"
    else:
        names = [name for name, value in now.items() if before.get(name) != value]
        why = f"which differs in {', '.join(names)}" if names else ""
    if why:
        raise RunExistsError(
            f"{config.output} holds a finished run, {why}: name another --output, or replace it "
            "with --overwrite"
        )


@contextmanager
def claimed(output: Path) -> Iterator[Path]:
    """Make the output folder and keep other processes out of it until the block ends.

    Raises:
        OutputError: it cannot be made.
        RunExistsError: another process trains into it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot write here ({error.strerror or error})") from error
    try:
        with locked(output):
            yield output
    except BlockingIOError as error:
        raise RunExistsError(
            f"{output}: another process is training into this folder; name another --output"
        ) from error


def save_run(
    policy: nn.Module, config: TrainConfig, dataset: Dataset, ran: dict[str, Any], steps: int
) -> None:
    """Write the model (or adapter), its tokenizer and the settings to the output folder.

    Everything is written beside the final files first and then renamed, so that a full disk
    leaves the model of an earlier run as it was, and no half one.

    Args:
        policy: the trained model.
        config: its settings.
        dataset: what it was trained on.
        ran: the run's identity.
        steps: updates done.

    Raises:
        OSError: nothing was changed.
    """
    output = Path(config.output)
    partial = output / SAVING
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quietly(), system_errors(output):
            policy.save_pretrained(partial)  # type: ignore[operator]
        for name in (*TOKENIZER_FILES, "added_tokens.json", "generation_config.json"):
            if (source := Path(config.model) / name).exists():
                shutil.copyfile(source, partial / name)
        settings = {
            "version": __version__,
            **asdict(config),
            "beta": beta_of(config),
            "precision": precision_of(config),
            "steps": steps,
            "identity": ran,
        }
        (partial / SETTINGS_FILE).write_text(json.dumps(settings, indent=1, default=str))
        (partial / DATA_REPORT_FILE).write_text(json.dumps(dataset.report.to_dict(), indent=1))
        for path in partial.iterdir():
            finalize(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _publish(partial, output)


def _publish(partial: Path, output: Path) -> None:
    """Move the files into `output`, where no weights of an earlier run stay behind."""
    names = sorted(path.name for path in partial.iterdir())
    # The settings go first and come last: they never describe another run's weights.
    (output / SETTINGS_FILE).unlink(missing_ok=True)
    for name in sorted(names, key=SETTINGS_FILE.__eq__):
        (partial / name).replace(output / name)
    for stale in (*output.glob("*.safetensors"), *(output / name for name in MODEL_FILES)):
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    partial.rmdir()
    sync(output)


def history_of(output: Path, steps: int) -> list[dict[str, float]]:
    """Read the metrics of a finished run's updates; none where they are not all there."""
    try:
        lines = (output / METRICS_FILE).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        whole = [row.pop("step") for row in rows] == [*range(1, steps + 1)]
    except (OSError, ValueError, KeyError):
        return []
    return rows if whole else []


def reward_beta(policy: PathLike, given: float | None) -> float:
    """Return β of a policy's reward: the given one, or that of the run that trained it.

    Says so where the given one differs from the run's.

    Args:
        policy: folder of the trained model or adapter.
        given: what the user asks for, if anything.

    Raises:
        ConfigError: none is given, and the folder names none.
    """
    path, settings = Path(policy) / SETTINGS_FILE, settings_of(policy)
    trained = _trained_beta(settings) if settings else None
    if given is not None:
        if trained is not None and given != trained:
            say(f"beta is {given} as given; the policy was trained with {trained} ({path})")
        return given
    if trained is None:
        why = f"{path} names no β against a reference" if settings else f"there is no {path}"
        raise ConfigError(f"give --beta, that of the policy's training: {why}")
    return trained


def _trained_beta(settings: dict[str, Any]) -> float | None:
    """Return a run's β where it weighs the distance to a reference."""
    loss = PAIR_LOSSES.get(settings.get("loss", ""))
    beta = settings.get("beta")
    weighs = loss is not None and loss.needs_reference
    return float(beta) if weighs and isinstance(beta, int | float) else None


_FIELD = "date"


def date_of_run(config: TrainConfig) -> str | None:
    """Return the date of the run in the output folder that this one goes on with or repeats."""
    if config.overwrite:
        return None
    newest = checkpoint.newest(Path(config.output) / CHECKPOINTS)
    if newest is None:
        return date_of_policy(config.output)
    try:
        state = json.loads((newest / "state.json").read_text("utf-8"))
        return _text(state["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged checkpoint, which whoever loads it names


def date_of_policy(folder: PathLike) -> str | None:
    """Return the date of the run that trained a model."""
    rules = (settings_of(folder) or {}).get("rules")
    return _text(rules) if isinstance(rules, Mapping) else None


def date_of_store(store: Store) -> str | None:
    """Return the date in the prompts of a store."""
    rules = json.loads(store.metadata or "{}").get("rules")
    return _text(rules) if isinstance(rules, Mapping) else None


def date_of_cache(folder: Path) -> str | None:
    """Return the date under which a cache's folder was filled; the latest of several."""
    return max(dates_of_cache(folder), default=None)


def dates_of_cache(folder: Path) -> list[str]:
    """Return every date under which a cache's folder was filled."""
    return sorted({date for fields in read_conditions(folder) if (date := _text(fields))})


def record_date(folder: Path, date: str | None) -> None:
    """Record the date under which a cache's folder is being filled, if the prompts hold one."""
    if date:
        record_conditions(folder, {_FIELD: date})


def date_miss(folder: Path, date: str | None) -> str:
    """Name the dates where a cache lacks completions and was filled under another; else ""."""
    others = [other for other in dates_of_cache(folder) if other != date]
    if not date or not others:
        return ""
    return (
        f". The chat template writes the date into its prompts, here {date}, and the cache was "
        f"filled under {', '.join(others)}: give --date {others[-1]} to read it"
    )


def _text(fields: Mapping[str, Any]) -> str | None:
    found = fields.get(_FIELD)
    return found if isinstance(found, str) else None
