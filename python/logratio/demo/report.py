"""The demo's tables and plots, and the commands to run next."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from logratio.demo.run import BETA, Demo, DemoConfig, DemoResult, Judged
from logratio.extras import require
from logratio.intervals import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def summary(result: DemoResult) -> dict[str, Any]:
    """Return the results as a dict, for `demo.json` and the tests."""
    return {
        "win_rate": result.win_rate,
        "sft_rule": float(result.sft.rewards.mean()),
        "dpo_rule": float(result.dpo.rewards.mean()),
        "evaluation": result.evaluation.to_dict(),
        "best_of": [asdict(row) for row in result.best_of],
        "seconds": result.seconds,
    }


def rows(result: DemoResult) -> list[tuple[str, str, str]]:
    """Return the rows of the comparison: name, SFT model, DPO policy."""
    evaluation, kl = result.evaluation, result.evaluation.kl
    assert kl is not None
    low, high = evaluation.accuracy_interval
    accuracy = f"{evaluation.accuracy:.3f} ({low:.3f} to {high:.3f})"
    return [
        ("hidden rule, mean score", _mean(result.sft), _mean(result.dpo)),
        ("win rate by the rule", "0.500", f"{result.win_rate:.3f}"),
        ("preference accuracy", "0.500 (ties)", accuracy),
        ("reward margin", "0", f"{evaluation.margin:.3f}"),
        ("KL to the reference, nats", "0", f"{kl.nats:.2f}{spread(kl.standard_error)}"),
        ("mean length, words", _length(result.sft), _length(result.dpo)),
    ]


def best_of_rows(result: DemoResult) -> list[tuple[str, str, str, str]]:
    """Return the rows of best-of-N: N, chosen by the reward, at random, and by the rule."""
    return [
        (
            f"best of {row.n}",
            f"{row.reward:.2f} ± {1.96 * row.standard_error:.2f}",
            f"{row.random:.2f}",
            f"{row.oracle:.2f}",
        )
        for row in result.best_of
    ]


def _mean(judged: Judged) -> str:
    error = judged.rewards.std(ddof=1) / np.sqrt(len(judged.rewards))
    return f"{judged.rewards.mean():.2f} ± {1.96 * error:.2f}"


def _length(judged: Judged) -> str:
    return f"{judged.lengths.mean():.1f}"


CURVES = (
    ("loss", "DPO loss"),
    ("rewards/accuracies", "accuracy in training"),
    ("rewards/margins", "reward margin"),
)


def draw_picture(folder: Path, result: DemoResult) -> Path:
    """Write `demo.png` with three training curves and both tables; return its path."""
    from matplotlib.figure import Figure

    lines = (folder / "dpo" / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplot_mosaic([["0", "1", "2"], ["models", "models", "best"]])
    for place, (name, title) in enumerate(CURVES):
        _curve(axes[str(place)], history, name, title)
    _table(axes["models"], ("", "SFT model", "DPO policy"), rows(result))
    _table(axes["best"], ("", "reward", "random", "oracle"), best_of_rows(result))
    path = folder / "demo.png"
    figure.savefig(path, dpi=110)
    return path


def _curve(axes: "Axes", history: list[dict[str, Any]], name: str, title: str) -> None:
    axes.plot([row["step"] for row in history], [row[name] for row in history], linewidth=1)
    axes.set_title(title)
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)


def _table(axes: "Axes", head: tuple[str, ...], body: list[Any]) -> None:
    axes.axis("off")
    table = axes.table(cellText=body, colLabels=head, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.7)


NEEDED = ("matplotlib", "onnx", "onnxscript", "onnxruntime")
FORECAST = "needs about 2 minutes on two idle cores, 2 GB of memory and 10 MB of disk"


def show(config: DemoConfig) -> DemoResult:
    """Run the demo, print its tables, and write `demo.png` and `demo.json`."""
    for module in NEEDED:
        require(module, "demo")
    console = Console()
    console.print(FORECAST)
    result = Demo(config, console).run()
    tables = [_models(result), _best_of(result)]
    for table in tables:
        console.print(table)
    picture = draw_picture(config.output, result)
    (config.output / "demo.json").write_text(json.dumps(summary(result), indent=1) + "\n")
    total = sum(result.seconds.values())
    console.print(f"{total:.0f} s in total; training curves and tables: {picture}")
    console.print(_next_steps(config.output), highlight=False, soft_wrap=True)
    return result


def _models(result: DemoResult) -> Table:
    pairs = result.evaluation.pairs
    count = len(result.sft.rewards)
    title = f"{count} held-out prompts, {pairs} held-out pairs (intervals are 95 %)"
    table = Table("", "SFT model", "DPO policy", title=title)
    for row in rows(result):
        table.add_row(*row)
    return table


def _best_of(result: DemoResult) -> Table:
    title = f"Hidden rule, stories of the SFT model (β = {BETA}, reward from the ONNX bundle)"
    table = Table("", "implicit reward", "random choice", "oracle", title=title)
    for row in best_of_rows(result):
        table.add_row(*row)
    return table


def _next_steps(folder: Path) -> str:
    return f"""
Next, on your own data (JSON lines with prompt, chosen, rejected) and model folder:

  logratio precompute --model MODEL --data pairs.jsonl --cache cache
  logratio train      --model MODEL --data pairs.jsonl --cache cache --output policy
  logratio evaluate   --policy policy --reference MODEL --data held_out.jsonl --samples 200
  logratio export     --policy policy --reference MODEL --beta 0.1 --output bundle
  logratio serve      --bundle bundle

or serve the demo's model:  logratio serve --bundle {folder / "bundle"}"""
