"""The file of a run: its settings as YAML, with which `logratio train --config` repeats it."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from logratio import __version__
from logratio.config_file import INPUTS, unwritable
from logratio.data.readers.inputs import as_inputs, names_stdin
from logratio.durable import write_atomic
from logratio.progress import say
from logratio.training.config import TrainConfig
from logratio.training.given_model import is_in_memory, name_of
from logratio.training.methods.objective import ALONE, Objective
from logratio.training.models import precision_of, training_budget
from logratio.training.router_loss import router_coefficient

RUN_FILE = "run.yaml"
FOLDERS = ("output", "cache")
"""Settings that name a folder."""
MODELS = ("model", "reference")
"""Settings that name a model: a folder, or an id of the hub with its commit."""


def record_settings(config: TrainConfig) -> None:
    """Write the settings of a run to `RUN_FILE` in its output folder.

    The file has the values that the run uses, defaults included, and absolute paths, so that
    `logratio train --config OUTPUT/run.yaml` repeats the run from any working directory. If it
    cannot be written, a note is printed and the run continues.
    """
    path = Path(config.output) / RUN_FILE
    objective = Objective.of(config)
    options = objective.options
    alone: dict[str, Any] = {name: options.pop(name) for name in ALONE if name in options}
    used = replace(
        with_absolute_paths(config),
        **alone,
        loss_options={n: v for n, v in (options or config.loss_options).items() if n not in alone},
        beta=objective.beta_for_all(config.beta),
        precision=precision_of(config),
        token_budget=training_budget(config),
        router_aux_loss_coef=router_coefficient(config),
    )
    try:
        write_atomic(path, "".join(_comments(config, used)) + used.to_yaml())
    except OSError as error:
        say(f"{path} could not be written: {error}")


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return settings that name the same files and folders from any working directory."""
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    inputs: dict[str, Any] = {
        name: [absolute(one) for one in as_inputs(given[name])]
        for name in INPUTS
        if given.get(name) is not None
    }
    folders: dict[str, Any] = {name: absolute(given[name]) for name in FOLDERS}
    models: dict[str, Any] = {
        name: name_of(given[name]) for name in MODELS if given[name] is not None
    }
    return replace(config, **inputs, **folders, **models)


def absolute(given: Any) -> Any:
    """Return the absolute path of a file or folder; any other input unchanged."""
    is_path = isinstance(given, str | Path) and not names_stdin(given)
    return str(Path(given).absolute()) if is_path else given


def _comments(given: TrainConfig, config: TrainConfig) -> Iterator[str]:
    yield f"# The settings of a run of logratio {__version__}, defaults included.\n"
    yield "# Repeat it in another folder: logratio train --config run.yaml --output FOLDER\n"
    if any(map(names_stdin, as_inputs(config.data))):
        yield "# The data was standard input: pipe the same rows in again.\n"
    for name in MODELS:
        if (folder := getattr(given, name)) and is_in_memory(folder):
            yield f"# The {name} was an object in memory: save it, and name its folder here.\n"
    for name in (*unwritable(config), *unwritable(config.formats)):
        yield f"# Not in this file, because it was a Python object: {name}\n"
