"""Rounds of new processes: every arm once per round, in rotating order."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step_arms import Arm
from step_gate import check
from step_record import Spec
from step_summary import steady_seconds

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker ended without a record."""


@dataclass(frozen=True)
class Pythons:
    """Which interpreter runs which worker: `rival` is the one that has TRL."""

    rival: str | None
    own: str = sys.executable

    def of(self, worker: str) -> str:
        """Return the interpreter for a worker's script."""
        if not worker.startswith("rival_"):
            return self.own
        if self.rival is None:
            raise WorkerError("TRL is not installed")
        return self.rival


def environment(threads: int) -> dict[str, str]:
    """Return the environment of every worker: so many threads, nothing downloaded."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | counts | quiet


def run_script(python: str, script: str, arguments: Sequence[str], threads: int) -> str:
    """Run a script of this folder; return what it printed last.

    Raises:
        WorkerError: it failed; the end of its output is printed.
    """
    command = [python, str(HERE / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(threads), check=False
    )
    if done.returncode:
        print(done.stdout[-2_000:], done.stderr[-4_000:], file=sys.stderr)
        raise WorkerError(f"exit status {done.returncode}")
    return (done.stdout.splitlines() or [""])[-1]


def run_arm(name: str, arm: Arm, spec: Spec, pythons: Pythons) -> Record:
    """Run one arm in a fresh process; return its record.

    Raises:
        WorkerError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, given = Path(folder) / "record.json", Path(folder) / "spec.json"
        replace(spec, result=str(result), arm=name, settings=dict(arm.settings)).write(given)
        run_script(pythons.of(arm.worker), arm.worker, [str(given)], spec.threads)
        record: Record = json.loads(result.read_text())
    return record


def run_rounds(
    names: Sequence[str],
    arms: Mapping[str, Arm],
    spec: Spec,
    pythons: Pythons,
    rounds: int,
    ended: Callable[[Record], None] = lambda _: None,
) -> tuple[list[dict[str, Record]], dict[str, str], dict[str, dict[str, float]]]:
    """Run every arm in every round, the first of `names` being "ours".

    `ended` is called with each record that passed the gate, immediately.

    Returns:
        The records of each round by arm, without arms that failed; why those failed; and the gaps
        of the gate for each arm.

    Raises:
        GateError: an arm did other work than ours.
        WorkerError: ours failed.
    """
    found: list[dict[str, Record]] = []
    failures: dict[str, str] = {}
    gaps: dict[str, dict[str, float]] = {}
    first: Record | None = None
    for turn in range(rounds):
        found.append({})
        at = turn % len(names)
        for name in (*names[at:], *names[:at]):
            if name in failures:
                continue
            try:
                record = run_arm(name, arms[name], spec, pythons)
            except WorkerError as error:
                if name in ("ours", "ours-again"):
                    raise
                failures[name] = str(error)
                print(f"{name}: {error}", flush=True)
                continue
            first = first or record
            gaps[name] = check(first, record, spec.precision)
            found[-1][name] = record
            _tell(turn, name, record, spec)
            ended(record)
    complete = [{n: r for n, r in each.items() if n not in failures} for each in found]
    return complete, failures, gaps


def _tell(turn: int, name: str, record: Record, spec: Spec) -> None:
    seconds = steady_seconds(record, spec.warmup) / spec.measured
    above = record["memory"]["above_model"] / 1e6
    print(f"round {turn + 1}, {name}: {seconds:.3f} s an update, {above:,.0f} MB", flush=True)
