"""Train with every method on the same small tasks, and compare the time and memory of an update.

    python benches/bench_methods.py [--only NAME ...] [--kinds task stories cost] [--seeds 3]
    python benches/bench_methods.py --table          # only print results/methods.jsonl

Three kinds of rows in results/methods.jsonl:

- `task`: the demo's task, one run for each method and seed. The policy starts from an SFT model and
  learns from data that a hidden rule ranked. Each run has the same number of updates, completions
  per update and learning rate, the method's default β and options. `win` is the share of held-out
  prompts where the policy's story scores higher by the rule than the SFT model's; ties count half.
- `stories`: the same on `story_prefs.jsonl` with stories260K, one seed; `win` is by a word rule.
- `cost`: CPU time and memory of an update against DPO's; see methods_cost.py.

A row that exists with the same settings is not measured again, so the bench may be stopped and
started again. `--folder` keeps the SFT models and the data between starts.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from methods_cost import COST_SIZES, Bench
from methods_tasks import BenchTask, demo_task, story_task
from shared_material import STORIES, STORIES260K, check_shared

from logratio._rust import ROLES, Store
from logratio.durable import write_atomic
from logratio.intervals import wilson
from logratio.progress import be_silent
from logratio.training import DPOTrainer, EvaluateConfig, TrainConfig, evaluate
from logratio.training.methods.method import DataKind
from logratio.training.methods.objective import Objective
from logratio.training.methods.table import METHODS

RESULTS = Path(__file__).parent / "results" / "methods.jsonl"
VARIANTS = {"discopop-tau-1": ("discopop", {"tau": 1.0})}
"""A method with other options than its own. With the paper's τ of 0.05, the gradient of discopop at
policy = reference lowers the chosen answer's log-ratio, to a local minimum at βD = -0.12."""
POLICIES = [name for name, method in METHODS.items() if not method.scores]
"""Reward models write no stories."""
NAMES = (*POLICIES, "mpo", "iterative-rpo", *VARIANTS)
KINDS = ("task", "stories", "cost")
Row = dict[str, Any]


def configuration(task: BenchTask, name: str, seed: int, output: Path) -> TrainConfig:
    """Return the settings of a run.

    RAFT imitates the best answer of each list, and reads lists. A method that compares whole
    distributions needs the reference in memory; the others read its log-probs from a cache.
    """
    sizes, (loss, options) = task.sizes, VARIANTS.get(name, (name, {}))
    config = TrainConfig(
        task.model, "-", output, loss=loss, loss_options=options, lr=sizes.lr,
        max_steps=sizes.updates, seed=seed, save_every=0, report=False, report_to="none",
        rules=task.rules,
    )  # fmt: skip
    objective = Objective.of(config)
    kind: DataKind = "lists" if name == "raft" else objective.data
    if kind not in task.data:
        raise LookupError(f"the data has no {kind}")
    per_group = {"pairs": 2, "lists": 2 if task.data[kind] == task.data["pairs"] else 4}
    groups = sizes.completions // (1 if config.loss == "raft" else per_group.get(kind, 1))
    config = replace(config, data=[task.data[kind]], batch_size=groups)
    if not objective.needs_reference or objective.needs_divergences:
        return config
    return replace(config, cache=task.cache, precompute=True)


def trained_tokens(store: Store, completions: int) -> float:
    """Return the mean number of completion tokens per update; KTO's additional ones excluded."""
    counted = store.roles() != ROLES.index("mismatched")
    return float(store.counted_lengths()[counted].mean()) * completions


def judged(task: BenchTask, policy: Path, seed: int, folder: Path) -> Row:
    """Evaluate a policy on held-out pairs, and let the rule compare its stories."""
    file, samples = folder / "samples.jsonl", task.sizes.samples
    measured = evaluate(
        EvaluateConfig(
            policy, task.model, [task.held_out], beta=1.0, samples=samples, samples_file=file,
            max_new_tokens=task.max_new_tokens, seed=seed, rules=task.rules,
        ),
        show_progress=False,
    )  # fmt: skip
    assert measured.kl is not None
    drawn = [json.loads(line) for line in file.read_text().splitlines()]
    ours, theirs = (
        np.array([task.rule(row["prompt"], row[side]) for row in drawn])
        for side in ("policy", "reference")
    )
    return {
        "win": float(((np.sign(ours - theirs) + 1) / 2).mean()),
        "samples": samples,
        "rule": float(ours.mean()),
        "rule_of_reference": float(theirs.mean()),
        "accuracy": measured.accuracy,
        "pairs": measured.pairs,
        "kl": measured.kl.nats,
        "kl_error": measured.kl.standard_error,
        "length": measured.kl.mean_length,
        "words_of_reference": float(np.mean([len(row["reference"].split()) for row in drawn])),
        "words": float(np.mean([len(row["policy"].split()) for row in drawn])),
    }


def train_and_judge(task: BenchTask, name: str, seed: int) -> Row:
    """Train one policy, evaluate it, and return its figures."""
    with tempfile.TemporaryDirectory() as temporary:
        start, folder = process_time(), Path(temporary)
        config = configuration(task, name, seed, folder / "policy")
        trainer = DPOTrainer(config=config, show_progress=False)
        result = trainer.train()
        trained = process_time() - start
        completions = task.sizes.completions
        return {
            "beta": Objective.of(config).beta if Objective.of(config).has_beta else None,
            "groups_per_update": config.batch_size,
            "tokens_per_update": trained_tokens(trainer.store, completions),
            "loss": [result.history[0]["loss"], result.history[-1]["loss"]],
            "cpu_seconds": trained,
            **judged(task, result.output, seed, folder),
        }


class Results:
    """The rows of the results file, one for each kind, method and seed."""

    def __init__(self, path: Path = RESULTS) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        self.path, self.rows = path, [json.loads(line) for line in lines]

    def measure(self, key: Row, settings: Row, measured: Callable[[], Row]) -> None:
        """Add a row, unless it exists with the same settings; a failure is a row with its error."""
        if any(key.items() <= row.items() and self._is_done(row, settings) for row in self.rows):
            return
        self.rows = [row for row in self.rows if not key.items() <= row.items()]
        try:
            found = measured()
        except LookupError as reason:
            found = {"skipped": str(reason)}
        except Exception as error:  # whatever a method raises, the others are still measured
            found = {"error": f"{type(error).__name__}: {error}"}
        where = {"date": date.today().isoformat(), "torch": torch.__version__}
        row = {**key, **found, "settings": settings, **where, "machine": platform.machine()}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        write_atomic(self.path, "".join(json.dumps(one) + "\n" for one in self.rows))

    @staticmethod
    def _is_done(row: Row, settings: Row) -> bool:
        return row["settings"] == settings and "error" not in row

    def of(self, kind: str, method: str) -> list[Row]:
        """Return the rows of a method that have results."""
        key = {"kind": kind, "method": method}.items()
        return [row for row in self.rows if key <= row.items() and "settings" in row]


def learn(results: Results, task: BenchTask, names: list[str], seed: int) -> None:
    """Train and evaluate each method on a task."""
    for name in names:
        key = {"kind": task.name, "method": name, "seed": seed}

        def measured(name: str = name) -> Row:
            return train_and_judge(task, name, seed)

        results.measure(key, asdict(task.sizes), measured)


def compare(results: Results, names: list[str], folder: Path) -> None:
    """Compare an update of each method with DPO's."""
    bench = Bench(folder)
    for name in names:

        def measured(name: str = name) -> Row:
            return bench.against_dpo(name)

        results.measure({"kind": "cost", "method": name}, asdict(COST_SIZES), measured)


def table(results: Results) -> Iterator[str]:
    """Yield the lines of a Markdown table: one row for each method, means over seeds."""
    heads = "win", "of each seed", "accuracy", "KL", "words", "stories: accuracy", "time", "memory"
    yield f"| method | {' | '.join(heads)} |"
    yield "|" + " --- |" * (1 + len(heads))
    for name in NAMES:
        stories = learned(results.of("stories", name))[2]
        cells = *learned(results.of("task", name)), stories, *cost(results.of("cost", name))
        yield f"| `{name}` | {' | '.join(cells)} |"


def learned(rows: list[Row]) -> list[str]:
    """Return the cells of a task; shares have 95 % intervals, in which all seeds are pooled."""
    if failed := [row for row in rows if "win" not in row]:
        reason = failed[0].get("error", "not in the data")
        return [reason, "", reason, "", ""]
    if not rows:
        return [""] * 5
    wins = [row["win"] for row in rows]
    return [
        share(wins, sum(row["samples"] for row in rows)),
        ", ".join(f"{win:.2f}" for win in wins),
        share([row["accuracy"] for row in rows], sum(row["pairs"] for row in rows)),
        f"{np.mean([row['kl'] for row in rows]):.1f}",
        f"{np.mean([row['words'] for row in rows]):.1f}",
    ]


def share(values: list[float], count: int) -> str:
    """Write a mean of shares with Wilson's interval for all of their trials."""
    mean = float(np.mean(values))
    low, high = wilson(mean, count)
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def cost(rows: list[Row]) -> list[str]:
    """Return the cells of time and memory, as ratios to DPO."""
    if not rows or "time_ratio" not in rows[0]:
        return ["", ""]
    return [f"{rows[0]['time_ratio']:.2f}", f"{rows[0]['memory_ratio']:.2f}"]


def main() -> None:
    """Measure what is missing in the results file, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[*NAMES], metavar="NAME")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps SFT models and data between starts")
    parser.add_argument("--table", action="store_true", help="only print the table")
    given, results = parser.parse_args(), Results()
    if not given.table:
        torch.set_num_threads(1)
        be_silent()
        with tempfile.TemporaryDirectory() as temporary:
            measure(results, given, given.folder or Path(temporary))
    print(*table(results), sep="\n")


def measure(results: Results, given: argparse.Namespace, folder: Path) -> None:
    """Measure the kinds of rows that the command line names."""
    if "task" in given.kinds:
        for seed in range(given.seeds):
            learn(results, demo_task(folder / str(seed), seed), given.only, seed)
    if "stories" in given.kinds:
        check_shared(STORIES, STORIES260K)
        learn(results, story_task(folder / "stories", 0), given.only, 0)
    if "cost" in given.kinds:
        compare(results, [name for name in given.only if name not in VARIANTS], folder / "cost")


if __name__ == "__main__":
    main()
