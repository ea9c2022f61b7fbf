"""Commands that run in one process refuse to be started by torchrun."""

import os
from collections.abc import Mapping

from logratio.errors import ConfigError


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return the rank of this process and the number of processes that torchrun started.

    Args:
        environment: Environment variables; torchrun sets RANK and WORLD_SIZE.
    """
    rank, processes = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if "RANK" not in environment or not 0 <= rank < processes:
        return 0, 1
    return rank, processes


def refuse_multiple_processes(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to run a command under torchrun with several processes.

    Each process would do the whole work and write to the same output.

    Args:
        command: Its name, for the message.
        environment: Environment variables, as in `launched`.

    Raises:
        ConfigError: torchrun started more than one process.
    """
    if (count := launched(environment)[1]) > 1:
        raise ConfigError(
            f"{command} runs in one process, and torchrun started {count} (WORLD_SIZE): each would "
            "do the whole work. Start it without torchrun"
        )
