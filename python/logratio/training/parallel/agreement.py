"""Refuse to train if the processes of a run do not have the same data, models and settings."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from logratio._rust import Store
from logratio.errors import ConfigError
from logratio.training.checkpoint import differences
from logratio.training.parallel.processes import Processes


def refuse_differences(processes: Processes, own: Mapping[str, Any], store: Store) -> None:
    """Compare the identity of the run in all processes; all call this together.

    Args:
        processes: The processes of the run.
        own: The identity in this process, as JSON values: settings, digests of models and data.
        store: The data of this process.

    Raises:
        ConfigError: Two processes differ; the message names them, and the settings or files.
    """
    everyone = processes.share(dict(own))
    other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if other is None:
        return
    where = "at rank 0", f"at rank {other}"
    what = differences(everyone[0], everyone[other], where)
    files = processes.share(_file_digests(store))
    names = [
        name for name in files[0] | files[other] if files[0].get(name) != files[other].get(name)
    ]
    if names:
        what += f" (different in {', '.join(sorted(names))})"
    raise ConfigError(
        f"ranks 0 and {other} would train different runs: they differ in {what}. Give every host "
        "the same files and settings"
    )


def refuse_separate_outputs(processes: Processes, output: Path) -> None:
    """Check that all processes see one output folder; all call this together.

    Raises:
        ConfigError: A process does not see a file that the first one has written.
    """
    if processes.count == 1:
        return
    probe = output / ".shared-by-all-ranks"
    if processes.is_first:
        probe.touch()
    processes.wait()
    seen = processes.share(probe.exists())
    if processes.is_first:
        probe.unlink(missing_ok=True)
    if not all(seen):
        raise ConfigError(
            f"rank {seen.index(False)} does not see the output folder {output} of rank 0: it must "
            "be a folder that all hosts share"
        )


def _file_digests(store: Store) -> dict[str, str]:
    """Hash the tokenized groups of each input file."""
    names = json.loads(store.metadata or "{}").get("files", [])
    files, _ = store.sources()
    owners = np.repeat(files, np.diff(store.completion_offsets()))
    keys = store.keys()
    return {
        str(name): hashlib.sha256(keys[owners == number].tobytes()).hexdigest()
        for number, name in enumerate(names)
    }
