"""The forecast of `--world-size N --gpu cpu` against real updates by DDP and FSDP2 over gloo.

    python benches/bench_cluster.py [--rounds 3] [--updates 5] [--models narrow wide] [--clock cpu]

Each round measures the machine as the forecast does, and then runs updates of two processes of a
small Llama with random weights and pairs, in the same minutes. Every process has one thread. The
first update of a run is left out. Seconds are by two clocks: the wall, and the CPU time of a
process, which depends less on other load. `--clock` names the one that the machine is measured by.
Each comparison is a row of results/cluster.jsonl, with the load of the machine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from cluster_worker import store_of
from transformers import LlamaConfig

from logratio.training import Cluster, TrainConfig
from logratio.training.cluster import ClusterForecast, Planner
from logratio.training.cluster_plan import first_groups
from logratio.training.config import Parallel
from logratio.training.measured_machine import Task, measure_cpu
from logratio.training.model_shape import policy_shape
from logratio.training.rank_loads import rank_loads

RESULTS = Path(__file__).parent / "results" / "cluster.jsonl"
WORKER = Path(__file__).with_name("cluster_worker.py")
MODELS = {
    "narrow": LlamaConfig(
        num_hidden_layers=6, hidden_size=288, intermediate_size=768, num_attention_heads=6,
        num_key_value_heads=6, vocab_size=8192,
    ),
    "wide": LlamaConfig(
        num_hidden_layers=8, hidden_size=512, intermediate_size=1408, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=8192,
    ),
}  # fmt: skip
"""11 and 33 million parameters."""
RUNS: tuple[Parallel, ...] = ("ddp", "fsdp")
RANKS = 2
SHAPES = {
    "even": [[100, 100, 100]] * 4,
    "uneven": [[40, 30, 60], [200, 90, 40], [120, 150, 20], [60, 40, 30]],
}
"""Pairs of a rank's update: tokens of the prompt and of the completions."""
BUDGETS = {"even": 1300, "uneven": 500}
"""Tokens of a micro-batch: all pairs of an update at once, or several micro-batches."""


def settings(model: Path, shape: str) -> TrainConfig:
    """Return the settings of a run, with a cached reference."""
    return TrainConfig(
        model,
        "pairs",
        "out",
        cache="cache",
        precision="fp32",
        token_budget=BUDGETS[shape],
        batch_size=len(SHAPES[shape]) * RANKS,
    )


def run(spec: dict[str, Any]) -> list[dict[str, list[float]]]:
    """Run the processes of one run, and return the seconds of each."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "spec.json"
        file.write_text(json.dumps(spec | {"meeting": (Path(folder) / "meet").as_uri()}))
        commands = [[sys.executable, str(WORKER), str(file), str(r)] for r in range(spec["ranks"])]
        for process in [subprocess.Popen(command) for command in commands]:
            if process.wait():
                raise SystemExit(f"a worker failed with {process.returncode}")
        return [json.loads(Path(f"{file}.{r}").read_text()) for r in range(spec["ranks"])]


def compare(name: str, folder: Path, shape: str, arguments: argparse.Namespace) -> Iterator[Any]:
    """Measure the machine, run all kinds of runs, and yield a row for each."""
    config = settings(folder, shape)
    sizes = policy_shape(config)
    lengths = SHAPES[shape] * (RANKS * arguments.updates)
    store = store_of(lengths)
    batch = first_groups(config, store)
    loads = rank_loads(config, store, RANKS, torch.device("cpu"))[1:]  # as measured
    for mode in RUNS:
        machine = measure_cpu(Task(str(folder), batch, clock=arguments.clock), sizes)
        topology = Cluster(RANKS, "cpu").topology(machine)
        forecast = Planner(replace(config, parallel=mode), topology, loads, 1).choose()
        spec = {"model": str(folder), "ranks": RANKS, "mode": mode, "threads": 1}
        spec |= {"lengths": lengths, "batch": config.batch_size, "tokens": config.token_budget}
        seconds = run(spec | {"updates": arguments.updates})
        yield row(name, shape, forecast, seconds) | {"clock": arguments.clock}


def row(
    name: str, shape: str, forecast: ClusterForecast, seconds: list[dict[str, list[float]]]
) -> dict[str, Any]:
    """Return what is kept of a comparison: per clock, the slowest process of each update."""
    updates = {
        clock: [max(each) for each in zip(*(one[clock] for one in seconds), strict=True)][1:]
        for clock in ("wall", "cpu")
    }
    return {
        "date": date.today().isoformat(),
        "model": name,
        "shape": shape,
        "mode": forecast.mode,
        "processes": RANKS,
        "forecast": forecast.to_dict()["time"],
        "measured": {clock: fmean(times) for clock, times in updates.items()},
        "updates": updates,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def summarize(rows: list[dict[str, Any]]) -> None:
    """Print the ratio of forecast and measurement of each kind of run."""
    kinds = sorted({(r["model"], r["shape"], r["mode"]) for r in rows})
    for kind in kinds:
        own = [r for r in rows if (r["model"], r["shape"], r["mode"]) == kind]
        ratios = [r["forecast"]["total"] / r["measured"][r["clock"]] for r in own]
        seconds = median(r["measured"][r["clock"]] for r in own)
        shown = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        print(f"{kind}: {seconds:.2f} s; forecast / measured {median(ratios):.2f} ({shown})")


def main() -> None:
    """Compare, keep the rows, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    rows = []
    with TemporaryDirectory() as root:
        for name in arguments.models:
            MODELS[name].save_pretrained(Path(root) / name)
        for _ in range(arguments.rounds):
            for name in arguments.models:
                for shape in arguments.shapes:
                    for found in compare(name, Path(root) / name, shape, arguments):
                        rows.append(found)
                        with RESULTS.open("a") as file:
                            file.write(json.dumps(found) + "\n")
    summarize(rows)


if __name__ == "__main__":
    main()
