"""Checks, tests and benches for a few minutes on a GPU, the most important first.

    make gpu OUT=DIR
    python benches/gpu.py --out DIR [--wheels DIR] [--minutes 11.5] [--device cpu --tiny]

Needed: Python 3.11 or newer with torch, transformers, numpy, tokenizers and pytest; this package,
installed or built in place (python/logratio/_rust*.so). TRL's arms need trl, datasets, dill and
multiprocess: `--wheels` names a folder of wheels, which are unpacked into DIR without an index. A
step whose module is missing is skipped. No step downloads anything.

Each step has a time limit, and all steps together end before `--minutes`. Logs are streamed to
DIR/NN-name.log, and each step and result is a JSON line of DIR/results.jsonl, written when the step
ends, so that an interrupted run keeps its results. `--device cpu --tiny` is a rehearsal.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NEEDED = ("torch", "transformers", "numpy", "tokenizers", "pytest")
GRACE = 5
"""Seconds between asking a step to end and killing it."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its log.
        command: what is run, with this interpreter, in the repository's root.
        seconds: its time limit.
        needs: modules without which it is skipped.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()


def plan(device: str, *, tiny: bool, out: Path) -> list[Step]:
    """Return the steps, the most important first."""
    own = ("--device", device, *["--tiny"] * tiny)
    tests = ("-m", "pytest", "tests/python/gpu/test_gpu.py", "-q", "-rA", "-p", "no:cacheprovider")
    results = ("--results", str(out / "bench_step"))
    quick = ("--models", "toy", "--data", "short-prompt", "--batch", "2", "--updates", "2")
    bench: tuple[str, ...] = ("benches/bench_step.py", "--device", device, *results)
    if tiny:
        bench += (*quick, "--warmup", "1", "--rounds", "1", "--threads", "1", "--ours")
    arms = ("--arms", "plain-cached", *["trl"] * (not tiny))
    parts = {
        name: ("benches/gpu_parts.py", name, *own) for name in ("layers", "attention", "tiles")
    }
    several = ("-m", "pytest", "tests/python/gpu/test_gpu_parallel.py", *tests[3:])
    return [
        Step("smoke", ("benches/gpu_steps.py", "smoke", *own), 45),
        Step("tests", (*tests, "-k", "not flex and not float32 and not time_follows"), 100),
        Step("train", ("benches/gpu_steps.py", "train", *own), 90),
        Step("bench_step", (*bench, *arms), 150),
        Step("parallel", several, 60),
        Step("layers", parts["layers"], 75),
        Step("tiles", parts["tiles"], 25),
        Step("attention", parts["attention"], 50),
        Step("tests_flex", (*tests, "-k", "flex and bfloat16 and gemma2"), 60),
        Step("tests_fp32", (*tests, "-k", "no_completion_sees and float32"), 35),
    ]


class Runner:
    """Runs steps until the time is up."""

    def __init__(self, out: Path, minutes: float, environment: Mapping[str, str]) -> None:
        self.out, self.environment = out, environment
        self.end = time.monotonic() + 60 * minutes
        self._running: subprocess.Popen[bytes] | None = None

    def run(self, number: int, step: Step) -> str:
        """Run one step; return its status: ok, failed, cut off or skipped."""
        log, start, found = self.out / f"{number:02}-{step.name}.log", time.monotonic(), {}
        missing = [name for name in step.needs if not self._has(name)]
        left = min(step.seconds, self.end - start - GRACE)
        if missing or left < 1:
            why = f"not installed: {', '.join(missing)}" if missing else "no time is left"
            self.keep(step=step.name, status="skipped", reason=why)
            return "skipped"
        status = "cut off"
        try:
            with log.open("wb") as file:
                self._running = subprocess.Popen(
                    [sys.executable, *step.command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=dict(self.environment),
                    start_new_session=True,
                )
                code = self._running.wait(left)
            status, found = ("ok" if code == 0 else "failed"), {"exit": code}
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.stop()
            for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
                if line.startswith('{"'):
                    self.keep(step=step.name, found=json.loads(line))
            self.keep(step=step.name, status=status, seconds=time.monotonic() - start, **found)
        return status

    def stop(self) -> None:
        """End the running step and its child processes."""
        process, self._running = self._running, None
        if process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)
                process.wait(GRACE)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def keep(self, **row: Any) -> None:
        """Append a row to the results, and sync it to disk."""
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if "status" in row:
            print(json.dumps(row), flush=True)

    def _has(self, module: str) -> bool:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        command = [sys.executable, "-c", code]
        return not subprocess.run(command, env=dict(self.environment), check=False).returncode


def environment(out: Path) -> dict[str, str]:
    """Return the environment of the steps: unpacked wheels, this package, no network."""
    path = [str(out / "wheels")]
    if any((ROOT / "python" / "logratio").glob("_rust*.so")):
        path.append(str(ROOT / "python"))
    path += [given for given in [os.environ.get("PYTHONPATH")] if given]
    quiet = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join(path)}


def unpack(wheels: Path, out: Path) -> None:
    """Unpack each wheel of a folder into the results, without index and dependencies."""
    files = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(out / "wheels"), *files], check=bool(files))


def main(given: Sequence[str] | None = None) -> None:
    """Run the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to unpack")
    parser.add_argument("--minutes", type=float, default=11.5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models")
    parser.add_argument("--only", nargs="*", help="names of steps")
    options = parser.parse_args(given)
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"not installed: {', '.join(lacking)}\n{__doc__}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(out, options.minutes, environment(out))

    def ended(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, ended)
    if options.wheels:
        unpack(options.wheels, out)
    steps = plan(options.device, tiny=options.tiny, out=out)
    chosen = [step for step in steps if not options.only or step.name in options.only]
    found = [runner.run(number, step) for number, step in enumerate(chosen)]
    sys.exit("failed" in found)


if __name__ == "__main__":
    main()
