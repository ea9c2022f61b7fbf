"""Several ranks for a test: children of one process that has imported everything."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from repository import ROOT


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: their exit codes, and what each printed."""

    codes: list[int]
    printed: list[str]

    def well(self) -> "Ended":
        """Return this, after checking that all ranks ended well."""
        assert not any(self.codes), "\n".join(self.printed)
        return self


def own_cores(cores: Iterable[int]) -> list[int]:
    """Return the share of `cores` of this one of pytest-xdist's workers.

    Ranks that wait for each other then wake on the same core, which costs a tenth less time than if
    they move between cores that other workers use too.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    every = sorted(cores)
    return every[worker % count :: count] or every


class RankServer:
    """Runs functions in ranks: see `forked_ranks.run`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "forked_ranks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._server.pid, own_cores(os.sched_getaffinity(0)))

    def __call__(self, ranks: int, call: str, *given: Any, **options: Any) -> Ended:
        """Run `call`, "module:function", in `ranks` ranks with the arguments `given`."""
        wanted = {"call": call, "given": given, "ranks": ranks, "folder": str(self._folder)}
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(wanted | options), file=self._server.stdin, flush=True)
        codes = json.loads(self._server.stdout.readline())
        names = [self._folder / f"rank{rank}.txt" for rank in range(ranks)]
        return Ended(codes, [name.read_text() for name in names])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._server:
            if self._server.stdin:
                self._server.stdin.close()
