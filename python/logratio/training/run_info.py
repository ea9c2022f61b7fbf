"""What is known at the start of a run, in a file of its output folder."""

import json
import platform
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from logratio import __version__
from logratio.data.store.row_report import DataReport
from logratio.durable import write_atomic
from logratio.report.run_files import INFO_FILE
from logratio.training.config import TrainConfig
from logratio.training.given_model import name_of
from logratio.training.methods.objective import ALONE, Objective
from logratio.training.models import precision_of
from logratio.training.router_loss import router_coefficient
from logratio.training.trackers import plain_settings
from logratio.training.validation import beta_of

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of logratio and of the libraries that its results depend on.

    Args:
        device: The device of the run, which is named as well.
    """
    found = {"logratio": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name(device)
    else:
        found["device"] = f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return found


def resolved_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings with the names of the models and the resolved values of the run."""
    chosen: dict[str, Any] = {"beta": beta_of(config), "precision": precision_of(config)}
    options = Objective.of(config).options
    chosen |= {name: options.pop(name) for name in ALONE if name in options}
    if options:
        chosen["loss_options"] = options
    chosen["router_aux_loss_coef"] = router_coefficient(config)
    chosen["model"] = name_of(config.model)
    chosen["reference"] = name_of(config.reference) if config.reference else None
    return plain_settings(config) | chosen


def write_run_info(
    config: TrainConfig, updates: int, device: torch.device, data: DataReport
) -> None:
    """Write what is known at the start of a run. A full disk does not stop the run.

    Args:
        config: Settings of the run.
        updates: Number of updates planned.
        device: The device of the run.
        data: The report on the rows of the data.
    """
    info = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "updates": updates,
        "settings": resolved_settings(config),
        "data": data.to_dict(),
        "versions": versions(device),
    }
    with suppress(OSError):
        write_atomic(Path(config.output) / INFO_FILE, json.dumps(info, indent=1) + "\n")
