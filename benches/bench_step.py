"""A training step against the plain recipe's and TRL's: pairs per second, and memory.

    python benches/bench_step.py [--models small large] [--data hh …] [--arms plain trl …]
        [--ladder] [--flatness] [--rounds 3] [--device cuda] [--install-rival]

Every arm has the same pairs in the same updates (checked by hash), and the same weights, AdamW,
learning rate, β and clipping. Arms run in new processes, alternating. Losses, sums and gradient
norms are compared before a time is accepted (`step_gate.py`), and ours runs twice as a control.
Arms are in `step_arms.py`, material in `step_material.py`, ratios in `step_summary.py`. Each
comparison is a row of results/step-*.jsonl. Memory is the peak above the model (`step_memory.py`).
With `--device cuda` the defaults are about five processes on one model of 0.5B (`PLANS`), to take
only minutes. Without TRL its arms are left out; `--install-rival` downloads it. Each worker's
record is stored when it ends (step-records.jsonl). This has not run on a GPU yet.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from shared_material import GPT2, HH, RIVAL, check_shared, rival_python
from step_arms import ARMS, LADDER, RIVALS
from step_flatness import BATCH, cost_per_pair, sharing
from step_flops import useful_flops
from step_gate import SUMS
from step_material import SHAPES, Wanted
from step_models import MODELS
from step_record import Spec
from step_rounds import HERE, Pythons, run_arm, run_rounds, run_script
from step_summary import compare, control, steady_seconds
from step_tuning import CANDIDATES, tuned

DEFAULT_BATCH = {"large": 8, "0.5B": 8, "1.5B": 8}
BESIDE = ("ours", "ours-again", "ours-fastest", "ours-cold")
"""Our arms compared with rivals; the first is the default, and the standard of the gate."""
PLANS: dict[str, dict[str, Any]] = {
    "cpu": {
        "models": ["small", "large"],
        "arms": list(RIVALS),
        "ours": list(BESIDE[:3]),
        "rounds": 3,
        "threads": 2,
        "precision": "fp32",
    },
    "cuda": {
        "models": ["0.5B"],
        "arms": ["plain-cached", "trl"],
        "ours": [],
        "rounds": 1,
        "threads": 8,
        "precision": "bf16-weights",
        "batch": 32,
    },
}
"""Default measurements per device. Tuned arms (trl-tuned, ours-fastest) take one process per
candidate, which is too long for a GPU."""

SHOWN = (
    *("arm", "against", "timed", "ratio", "interval", "memory_ratio", "flagged", "failure"),
    *("measured_pairs", "seconds_per_pair", "microseconds_per_token"),
    *("time_ratio", "token_ratio", "work_ratio"),
)

Row = dict[str, Any]


def make_material(wanted: Wanted) -> Row:
    """Create the material in a separate process; return its description."""
    given = Path(wanted.folder) / "wanted.json"
    given.write_text(json.dumps(asdict(wanted)))
    run_script(sys.executable, "step_material.py", [str(given)], wanted.threads)
    said: Row = json.loads((Path(wanted.folder) / "material.json").read_text())
    return said


def measured_flops(spec: Spec, model: str) -> float:
    """Count the useful operations of the measured updates."""
    lines = (Path(spec.material) / f"{spec.order}.jsonl").read_text().splitlines()
    pairs = [
        (len(row["prompt"]), len(row["chosen"]), len(row["rejected"]))
        for line in lines[spec.warmup :]
        for row in json.loads(line)
    ]
    return useful_flops(MODELS[model](), pairs)


def session(
    options: argparse.Namespace, spec: Spec, names: Sequence[str], pythons: Pythons, about: Row
) -> Iterator[tuple[str, Row]]:
    """Run the arms with one order; yield each comparison with the name of its file."""
    arms, tuning = dict(ARMS), Row()
    own = [name for name in BESIDE if name in options.ours]
    for name in [name for name in CANDIDATES if name in {*own, *names}]:
        arms[name], tried = tuned(name, spec, pythons)
        tuning[name] = {"seconds": tried, "settings": arms[name].settings}
    about["tuning"] = tuning

    def record_ended(record: Row) -> None:
        short = {field: record[field] for field in ("arm", "seconds", "memory", "device")}
        keep(options.results, "records", about | short)

    rounds, failures, gaps = run_rounds(
        [*own, *names], arms, spec, pythons, options.rounds, record_ended
    )
    about = about | control(rounds, spec.warmup)
    flops, peak = measured_flops(spec, about["model"]), about["peak_flops"]
    typical = {
        name: median(steady_seconds(found[name], spec.warmup) for found in rounds)
        for name in rounds[0]
    }
    about["mfu"] = {name: flops / seconds / peak for name, seconds in typical.items()}
    pairs = spec.batch * spec.measured
    about["pairs_per_second"] = {name: pairs / seconds for name, seconds in typical.items()}
    about |= {"device": rounds[0]["ours"]["device"], "gate": gaps}
    for name in names:
        is_rung = name in LADDER
        file = "ladder" if is_rung else f"{about['model']}-{about['data']}-{name}"
        sides = [(name, "ours")] if is_rung else [(o, name) for o in own if o != "ours-again"]
        for arm, against in sides:
            if failed := failures.get(arm) or failures.get(against):
                found: Row = {"arm": arm, "against": against, "ratio": None, "failure": failed}
            else:
                found = compare(rounds, arm, against, spec.warmup)
            yield file, about | found


def common_spec(options: argparse.Namespace, batch: int) -> Spec:
    """Return the settings common to all workers of a run, without material and arm."""
    return Spec(
        material="",
        result="",
        arm="",
        batch=batch,
        warmup=options.warmup,
        measured=options.updates,
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        threads=options.threads,
    )


def bench(options: argparse.Namespace, model: str, data: str, pythons: Pythons) -> None:
    """Run all arms on one material, and store every row."""
    batch = options.batch or DEFAULT_BATCH.get(model, 16)
    spec = common_spec(options, batch)
    with tempfile.TemporaryDirectory() as folder:
        wanted = Wanted(
            *(folder, model, data, batch, spec.updates),
            *(spec.seed, spec.threads, spec.device, spec.precision),
        )
        said = make_material(wanted)
        about = described(options, spec, model, data) | {"material": said}
        for order in ("shuffled", "length_grouped"):
            names = [name for name in options.arms if ARMS[name].order == order]
            if not names:
                continue
            own_spec = replace(spec, material=folder, order=order)
            for file, row in session(options, own_spec, names, pythons, about | {"order": order}):
                keep(options.results, file, row)


def flatness(options: argparse.Namespace, model: str, data: str) -> None:
    """Measure the cost per pair and the gain of sharing, and store every row."""
    spec = common_spec(options, BATCH)
    about = described(options, spec, model, data)
    for pairs in options.pairs:
        with tempfile.TemporaryDirectory() as folder:
            updates = 1 + pairs // BATCH
            wanted = Wanted(
                *(folder, model, data, BATCH, updates),
                *(spec.seed, spec.threads, spec.device, spec.precision),
            )
            said = make_material(wanted)
            own_spec = replace(spec, material=folder, warmup=1, measured=updates - 1)
            record = run_arm("ours", ARMS["ours"], own_spec, Pythons(None))
            keep(options.results, "flatness", about | cost_per_pair(record, own_spec, said))
            if pairs == min(options.pairs):
                keep(options.results, "sharing", about | sharing(own_spec, model, options.rounds))


def described(options: argparse.Namespace, spec: Spec, model: str, data: str) -> Row:
    """Return the fields of a row that describe how it was measured."""
    peak = run_script(
        sys.executable,
        "step_flops.py",
        [spec.device, spec.precision, str(spec.threads)],
        spec.threads,
    )
    names = ("torch", "transformers", "trl", "logratio")
    return {
        "date": date.today().isoformat(),
        "model": model,
        "data": data,
        "batch": spec.batch,
        "updates": {"warmup": spec.warmup, "measured": spec.measured},
        "threads": spec.threads,
        "precision": spec.precision,
        "seed": spec.seed,
        "rounds": options.rounds,
        "peak_flops": json.loads(peak),
        "processor": platform.processor() or platform.machine(),
        "versions": {name: installed(name) for name in names}
        | {"python": platform.python_version()},
    }


def installed(name: str) -> str:
    """Return a package's version; for TRL in another environment, the requested one."""
    if name == "trl" and find_spec("trl") is None:
        return RIVAL.removeprefix("trl==")
    if name == "logratio":
        import logratio

        return logratio.__version__
    return version(name)


def keep(folder: Path, name: str, row: Row) -> None:
    """Append a row to a file of results, and print its ratios."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"step-{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = {field: row[field] for field in SHOWN if field in row}
    print(json.dumps(shown), flush=True)


def with_rival(options: argparse.Namespace, folder: Path) -> str | None:
    """Return the interpreter of TRL's arms; if there is none, print that they are left out."""
    rivals = [name for name in options.arms if name.startswith("trl")]
    if options.flatness or not rivals:
        return None
    python = rival_python(options.rival_python, folder, install=options.install_rival)
    if python is None:
        options.arms = [name for name in options.arms if name not in rivals]
        print(
            f"TRL is not installed: {' and '.join(rivals)} left out; give --install-rival to "
            "download it, or --rival-python",
            flush=True,
        )
    return python


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with the defaults of its device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS)
    parser.add_argument("--data", nargs="*", choices=["hh", *SHAPES], default=["hh"])
    parser.add_argument("--arms", nargs="*", choices=[*RIVALS, *LADDER])
    parser.add_argument("--ours", nargs="*", choices=BESIDE)
    parser.add_argument("--ladder", action="store_true", help="the rungs, in place of --arms")
    parser.add_argument("--flatness", action="store_true", help="cost per pair, in place of arms")
    parser.add_argument("--pairs", nargs="*", type=int, default=[10, 100, 1_000])
    parser.add_argument("--batch", type=int, help="pairs an update; 16, for larger models 8")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--updates", type=int, default=8, help="measured ones")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(SUMS))
    parser.add_argument("--rival-python", help="an interpreter that has TRL")
    parser.add_argument("--install-rival", action="store_true", help="download TRL where it is not")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(given)
    for name, value in PLANS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.ours = ["ours", "ours-again", *options.ours]
    if options.ladder:
        options.arms, options.ours = list(LADDER), ["ours", "ours-again"]
    return options


def main() -> None:
    """Run the selected measurements."""
    options = parsed()
    if "hh" in options.data:
        check_shared(GPT2, HH)
    with tempfile.TemporaryDirectory() as folder:
        python = with_rival(options, Path(folder))
        for model in options.models:
            for data in options.data:
                if options.flatness:
                    flatness(options, model, data)
                else:
                    bench(options, model, data, Pythons(python))


if __name__ == "__main__":
    main()
