"""Run commands in children of one process that has imported everything, with signals in them.

    python signalled_commands.py

Reads one JSON object a line: `arguments` of logratio, and `signals`, each with the number of a
signal, the module and the name of a function, the call before which it is sent, and a file that
notes that it was; 0 in place of a signal blocks there for ever. `errors` is a file for standard
error. Prints the exit code of each command. A test process cannot fork the command
itself: it has used autograd, which cannot be forked.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import preloaded  # noqa: F401 - children share it

from logratio.cli.app import main


def send(number: int, module: str, name: str, at: int, note: str) -> None:
    """Send a signal to this process before the `at`th call of a function, or block there."""
    owner: Any = import_module(module)
    *outer, last = name.split(".")
    for one in outer:
        owner = getattr(owner, one)
    real, calls = getattr(owner, last), 0

    def watched(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            Path(note).touch()
            if number == 0:
                threading.Event().wait()
            os.kill(os.getpid(), number)
        return real(*args, **options)

    setattr(owner, last, watched)


def run(arguments: Sequence[str], signals: Sequence[Sequence[Any]], errors: str) -> int:
    """Run a command in a child; return its exit code, or the negative number of its signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            silent = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1):
                os.dup2(silent, stream)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            for one in signals:
                send(*one)
            main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
