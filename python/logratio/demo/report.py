"""The demo's table, its pictures, and what to run next."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from logratio.demo.picture import draw_picture
from logratio.demo.run import BETA, Demo, DemoConfig, DemoResult
from logratio.demo.tables import best_of_rows, rows, summary
from logratio.extras import require

NEEDED = ("matplotlib", "onnx", "onnxscript", "onnxruntime")
FORECAST = "needs about 2 minutes on two idle cores, 2 GB of memory and 10 MB of disk"


def show(config: DemoConfig) -> DemoResult:
    """Run the demo, print its tables, and write `demo.png` and `demo.json` beside the rest."""
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
    console.print(f"{total:.0f} s in all; pictures of the curves and the tables: {picture}")
    console.print(_next_steps(config.output), highlight=False, soft_wrap=True)
    return result


def _models(result: DemoResult) -> Table:
    pairs = result.evaluation.pairs
    count = len(result.sft.rewards)
    title = f"{count} held-out prompts, {pairs} held-out pairs (± is 95 %)"
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

or serve what the demo made:  logratio serve --bundle {folder / "bundle"}"""
