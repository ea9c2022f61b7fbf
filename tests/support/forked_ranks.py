"""Run a function in several ranks, which are children of one process that has imported everything.

    python forked_ranks.py

Reads one JSON object a line: `call`, "module:function"; its arguments `given`; the number of
`ranks`, and of `hosts` that they pretend to be on; `signals` of `signalled_commands`, each preceded
by its rank; and the `folder` for what each rank prints. Prints the exit codes. Each rank gets the
environment variables that torchrun would set, and rank 0 keeps the common store.
"""

import atexit
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import preloaded  # noqa: F401 - children share it
from signalled_commands import send


def run(
    call: str,
    given: Sequence[Any],
    ranks: int,
    folder: str,
    hosts: int = 1,
    signals: Sequence[Sequence[Any]] = (),
    killed: Sequence[int] = (),
) -> list[int]:
    """Run the function in `ranks` children; return their exit codes.

    The ranks `killed` get a SIGKILL once all others have ended, as a launcher sends it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            _become(rank, ranks, hosts, port, folder)
            _call(call, given, [one for at, *one in signals if at == rank])
        children.append(child)
    codes = [_ended(child) for rank, child in enumerate(children) if rank not in killed]
    for rank in killed:
        os.kill(children[rank], signal.SIGKILL)
    return codes + [_ended(children[rank]) for rank in killed]


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(rank: int, ranks: int, hosts: int, port: int, folder: str) -> None:
    local = ranks // hosts
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank % local),
        LOCAL_WORLD_SIZE=str(local),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    printed = os.open(Path(folder) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(printed, stream)


def _call(call: str, given: Sequence[Any], signals: Sequence[Sequence[Any]]) -> None:
    code = 99
    try:
        for one in signals:
            send(*one)
        module, _, name = call.partition(":")
        getattr(import_module(module), name)(*given)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
