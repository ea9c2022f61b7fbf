"""Checks, tests and benches for a few minutes on a GPU, the most important first.

    make gpu OUT=DIR
    python benches/gpu.py --out DIR [--wheels DIR] [--minutes 11.5] [--device cpu --tiny]

Needed: Python 3.11 or newer with torch, transformers, numpy and tokenizers; this package,
installed or built in place (python/logratio/_rust*.so). `--wheels` names a folder of wheels, which
are unpacked into DIR without an index. Steps that are tests need pytest and hypothesis, that of
several processes also typer and rich: a step whose module is missing is skipped. Without peft the
arm `lora` of the layers fails, without trl, datasets, dill and multiprocess TRL's arms are left
out. The benches read real pairs and a tokenizer from LOGRATIO_SHARED, and draw random ids without
it. No step downloads anything.

Each step has a time limit, and all steps together end before `--minutes`. Logs are streamed to
DIR/NN-name.log, and each step and result is a JSON line of DIR/results.jsonl, written when the step
ends, so that an interrupted run keeps its results. `--device cpu --tiny` is a rehearsal.
"""

import argparse
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

from shared_material import GPT2, HH, SHARED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NEEDED = ("torch", "transformers", "numpy", "tokenizers", "logratio._rust")
"""Modules without which no step runs."""
TESTING = ("pytest", "hypothesis")
COMMAND_LINE = ("typer", "rich")
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


def plan(device: str, *, tiny: bool, out: Path, real: bool = True) -> list[Step]:
    """Return the steps, the most important first.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        tiny: whether all sizes are for a rehearsal.
        out: folder of the results.
        real: whether the folder of real data has what `bench_step.py` reads; False: it draws pairs.
    """
    own = ("--device", device, *["--tiny"] * tiny)
    tests = ("-m", "pytest", "tests/python/gpu/test_gpu.py", "-q", "-rA", "-p", "no:cacheprovider")
    results = ("--results", str(out / "bench_step"))
    drawn = ("--data", "short-prompt") if tiny or not real else ()
    quick = ("--models", "toy", "--batch", "2", "--updates", "2")
    bench: tuple[str, ...] = ("benches/bench_step.py", "--device", device, *drawn, *results)
    if tiny:
        bench += (*quick, "--warmup", "1", "--rounds", "1", "--threads", "1", "--ours")
    arms = ("--arms", "plain-cached", *["trl"] * (not tiny))
    parts = {
        name: ("benches/gpu_parts.py", name, *own) for name in ("layers", "attention", "tiles")
    }
    several = ("-m", "pytest", "tests/python/gpu/test_gpu_parallel.py", *tests[3:])
    quickest = (*tests, "-k", "not flex and not float32 and not time_follows")
    return [
        Step("smoke", ("benches/gpu_steps.py", "smoke", *own), 45),
        Step("tests", quickest, 100, TESTING),
        Step("train", ("benches/gpu_steps.py", "train", *own), 90),
        Step("bench_step", (*bench, *arms), 150),
        Step("parallel", several, 60, TESTING + COMMAND_LINE),
        Step("layers", parts["layers"], 75),
        Step("tiles", parts["tiles"], 25),
        Step("attention", parts["attention"], 50),
        Step("tests_flex", (*tests, "-k", "flex and bfloat16 and gemma2"), 60, TESTING),
        Step("tests_fp32", (*tests, "-k", "no_completion_sees and float32"), 35, TESTING),
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
        missing = lacking(step.needs, self.environment)
        left = min(step.seconds, self.end - start - GRACE)
        if missing or left < 1:
            why = f"cannot import {', '.join(missing)}" if missing else "no time is left"
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


def environment(out: Path) -> dict[str, str]:
    """Return the environment of the steps: unpacked wheels, this package, no network."""
    path = [str(out / "wheels")]
    if any((ROOT / "python" / "logratio").glob("_rust*.so")):
        path.append(str(ROOT / "python"))
    path += [given for given in [os.environ.get("PYTHONPATH")] if given]
    quiet = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PYTHONUNBUFFERED": "1"}
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join(path)}


def lacking(modules: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the modules that a step cannot import; one that exists may be of another Python."""
    if not modules:
        return []
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    try: importlib.import_module(name)\n"
        "    except Exception: print(name)"
    )
    command = [sys.executable, "-c", code, *modules]
    found = subprocess.run(
        command, env=dict(environment), stdout=subprocess.PIPE, text=True, check=True
    )
    return [name for name in found.stdout.split() if name in modules]


def unpack(wheels: Path, out: Path) -> None:
    """Unpack each wheel of a folder into the results, without index and dependencies.

    Raises:
        SystemExit: The folder has no wheels.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(f"--wheels: {wheels} has no wheels (*.whl)")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(out / "wheels"), *files], check=True)


def check_modules(environment: Mapping[str, str]) -> None:
    """Exit with one sentence if a module is missing that every step needs."""
    if missing := lacking(NEEDED, environment):
        sys.exit(
            f"{sys.executable} cannot import {', '.join(missing)}: install it, or name a folder "
            "with its wheel by --wheels; in a checkout, `make setup` builds logratio._rust"
        )


def has_real_data() -> bool:
    """Return whether the pairs and the tokenizer of `bench_step.py` exist; print it if not."""
    missing = [name for name in (HH, GPT2) if not (SHARED / name).exists()]
    if missing:
        print(
            f"{SHARED} lacks {' and '.join(missing)}: the benches draw pairs of random ids; set "
            "LOGRATIO_SHARED to the folder of real data and models for real pairs",
            flush=True,
        )
    return not missing


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
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.wheels:
        unpack(options.wheels, out)
    own = environment(out)
    check_modules(own)
    runner = Runner(out, options.minutes, own)

    def ended(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, ended)
    real = options.tiny or has_real_data()
    steps = plan(options.device, tiny=options.tiny, out=out, real=real)
    chosen = [step for step in steps if not options.only or step.name in options.only]
    found = [runner.run(number, step) for number, step in enumerate(chosen)]
    sys.exit("failed" in found)


if __name__ == "__main__":
    main()
