"""Prefixes shared across groups, against prompts shared in groups: tokens, and time of an update.

    python benches/bench_tree.py [--model narrow] [--rounds 3] [--pairs 32] [--shapes system …]

The same updates of the same random pairs in both layouts, alternating (A B B A …) in one process:
the log-probs, a DPO-like loss and its gradients, and a pass without gradients in the order of
`precompute`. The log-probs of both must agree first. Each shape is a row of results/tree.jsonl.
Seconds are CPU time of one thread, which does not depend on the load of the machine. Shapes:

- system: one system prompt of 500 tokens, then a question of 60 and two answers of 120 tokens;
- turns: conversations of 4 rated turns, a question of 40 and two answers of 100 tokens each;
- apart: a prompt of 150 and two answers of 80 tokens, nothing in common (the overhead).
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from step_models import MODELS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from logratio._rust import Store, StoreWriter
from logratio.data import Feed, FeedSettings
from logratio.data.feed import lay_out
from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Batch, Part, to_torch
from logratio.logps.completion import completion_logps, completion_loss, transformer
from logratio.training.memory import GroupQueue

UPDATE = 16
LAYOUTS = ("shared", "tree")
RESULTS = Path(__file__).parent / "results" / "tree.jsonl"

NARROW = LlamaConfig(
    num_hidden_layers=4,
    hidden_size=192,
    intermediate_size=512,
    num_attention_heads=6,
    vocab_size=4096,
    max_position_embeddings=1024,
)
"""The size of a story model: an update takes seconds."""

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
Drawn = Callable[[int], np.ndarray]
"""Maps a number of tokens to random ids."""


def system(ids: Drawn, pairs: int) -> Iterator[Pair]:
    """Yield questions after one system prompt."""
    start = ids(500)
    for _ in range(pairs):
        yield np.concatenate([start, ids(60)]), ids(120), ids(120)


def turns(ids: Drawn, pairs: int) -> Iterator[Pair]:
    """Yield the turns of conversations that continue with the chosen answer."""
    for _ in range(pairs // 4):
        prompt = ids(0)
        for _ in range(4):
            prompt = np.concatenate([prompt, ids(40)])
            chosen = ids(100)
            yield prompt, chosen, ids(100)
            prompt = np.concatenate([prompt, chosen])


def apart(ids: Drawn, pairs: int) -> Iterator[Pair]:
    """Yield pairs that have nothing in common."""
    for _ in range(pairs):
        yield ids(150), ids(80), ids(80)


SHAPES: dict[str, Callable[[Drawn, int], Iterator[Pair]]] = {
    "system": system,
    "turns": turns,
    "apart": apart,
}


def store_of(shape: str, vocabulary: int, count: int) -> Store:
    """Draw the pairs of a shape."""
    random = np.random.default_rng(0)
    writer = StoreWriter()

    def ids(length: int) -> np.ndarray:
        return random.integers(0, vocabulary, length).astype(np.int32)

    for line, (prompt, chosen, rejected) in enumerate(SHAPES[shape](ids, count)):
        answers = np.concatenate([chosen, rejected])
        lengths = np.array([len(chosen), len(rejected)], np.uint32)
        mask, roles = np.ones(len(answers), np.uint8), np.array([0, 1], np.uint8)
        writer.push(prompt, answers, mask, lengths, roles, 0, line)
    return writer.finish()


def updates(store: Store, layout: str, budget: int, order: str) -> list[list[Batch]]:
    """Lay out an epoch: the micro-batches of each update."""
    settings = FeedSettings(
        groups_per_update=UPDATE, token_budget=budget, layout=layout, order=order
    )
    made: list[list[Batch]] = []
    for micro in Feed(store, settings, depth=0, allocate=lambda size: np.zeros(size, np.uint8)):
        if micro.number == 0:
            made.append([])
        made[-1].append(to_torch(micro.layout))
    return made


def one_pass(store: Store, layout: str, budget: int) -> list[Batch]:
    """Lay out all groups in the order of `precompute`."""
    queue, made = GroupQueue(store, np.arange(len(store)), layout), []
    while len(queue):
        made.append(to_torch(lay_out(store, queue.take(budget), layout)))
    return made


def _share(logps: Tensor, part: Part) -> Tensor:
    chosen, rejected = part.targets.sums(logps).view(-1, 2).unbind(1)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum()


def train(model: nn.Module, batches: list[Batch]) -> float:
    """Do an update's passes; return the seconds."""
    model.zero_grad(set_to_none=True)
    start = process_time()
    for batch in batches:
        completion_loss(model, batch, _share).backward()
    return process_time() - start


@torch.no_grad()
def score(model: nn.Module, batches: list[Batch]) -> float:
    """Score batches; return the seconds."""
    start = process_time()
    for batch in batches:
        completion_logps(model, batch)
    return process_time() - start


@torch.no_grad()
def by_row(model: nn.Module, batches: list[Batch]) -> dict[int, float]:
    """Return the sum of each completion by its row in the store."""
    found: dict[int, float] = {}
    for batch in batches:
        sums = batch.targets.sums(completion_logps(model, batch))
        found |= dict(zip(batch.targets.rows.tolist(), sums.tolist(), strict=True))
    return found


def in_turns(run: Callable[[str], float], rounds: int) -> dict[str, list[float]]:
    """Run both layouts alternately, after an untimed run; return the seconds of each."""
    found: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for turn in range(-1, rounds):
        for layout in LAYOUTS if turn % 2 else LAYOUTS[::-1]:
            taken = run(layout)
            if turn >= 0:
                found[layout].append(taken)
    return found


def tokens(batches: list[Batch]) -> int:
    """Count the computed tokens."""
    return sum(batch.input_ids.numel() for batch in batches)


def measure(model: nn.Module, store: Store, rounds: int, budget: int, order: str) -> dict[str, Any]:
    """Time one update, and one pass over everything."""
    trained = {layout: updates(store, layout, budget, order)[0] for layout in LAYOUTS}
    passed = {layout: one_pass(store, layout, budget) for layout in LAYOUTS}
    sums = [by_row(model, passed[layout]) for layout in LAYOUTS]
    gap = max(abs(sums[0][row] - sums[1][row]) for row in sums[0])
    if gap > 1e-2:
        raise RuntimeError(f"the layouts differ by {gap} nats: not the same work")
    step = in_turns(lambda layout: train(model, trained[layout]), rounds)
    scoring = in_turns(lambda layout: score(model, passed[layout]), rounds)
    row: dict[str, Any] = {"sums_differ": gap}
    for name, taken, batches in (
        ("update", step, trained),
        ("pass", scoring, passed),
    ):
        counts = [tokens(batches[layout]) for layout in LAYOUTS]
        ratios = [a / b for a, b in zip(taken["shared"], taken["tree"], strict=True)]
        row[name] = {
            "tokens": counts,
            "micro_batches": [len(batches[layout]) for layout in LAYOUTS],
            "token_ratio": counts[0] / counts[1],
            "time_ratio": median(ratios),
            "time_ratios": ratios,
            "seconds": taken,
        }
    return row


def main() -> None:
    """Measure each shape, print and store its row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="narrow", choices=["narrow", *MODELS])
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--order", default="length_grouped", choices=["length_grouped", "shuffled"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = NARROW if options.model == "narrow" else MODELS[options.model]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with shared_prompts(transformer(model)), RESULTS.open("a") as results:
        for shape in options.shapes:
            store = store_of(shape, config.vocab_size, options.pairs)
            row = {
                "date": date.today().isoformat(),
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "shape": shape,
                **vars(options),
                "whole": int(
                    store.tree_tokens(np.arange(len(store)), np.array([0, len(store)]))[0]
                ),
                **measure(model, store, options.rounds, options.budget, options.order),
            }
            del row["shapes"]
            results.write(json.dumps(row) + "\n")
            results.flush()
            for name in ("update", "pass"):
                part = row[name]
                print(
                    f"{shape:8} {name:7} tokens {part['tokens'][0]:>8,} -> {part['tokens'][1]:>8,} "
                    f"({part['token_ratio']:.2f}), time {part['time_ratio']:.2f}"
                )


if __name__ == "__main__":
    main()
