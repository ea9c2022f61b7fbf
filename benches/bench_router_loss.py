"""What the router's load-balancing loss adds to an update of a mixture of experts.

    python benches/bench_router_loss.py [--rounds 5] [--pairs 32]

Whole updates of the trainer (SimPO, so that there is no reference pass to hide the cost) with and
without the loss, alternating (A B B A …) in one process, on random pairs with a prompt of 150 and
two answers of 80 tokens. Each update is run as one micro-batch and as several: only then a pass
without gradients counts the tokens of each expert. Seconds are CPU time of one thread, which does
not depend on the load of the machine. Each case is a row of results/router_loss.jsonl.
"""

import argparse
import json
import platform
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from logratio._rust import Store, StoreWriter
from logratio.data import Feed, FeedSettings
from logratio.logps.attention import shared_prompts
from logratio.logps.completion import transformer
from logratio.training import TrainConfig, load_model
from logratio.training.update import Updater

RESULTS = Path(__file__).parent / "results" / "router_loss.jsonl"
COEFFICIENT = 0.001
BUDGETS = {"one micro-batch": 1_000_000, "several": 2_048}
MIXTURE = MixtralConfig(
    num_hidden_layers=4,
    hidden_size=256,
    intermediate_size=384,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_local_experts=8,
    num_experts_per_tok=2,
    vocab_size=8192,
    max_position_embeddings=1024,
)


def store_of(pairs: int) -> Store:
    """Draw random pairs."""
    random, writer = np.random.default_rng(0), StoreWriter()
    for line in range(pairs):
        prompt, answers = (random.integers(0, 8192, n).astype(np.int32) for n in (150, 160))
        lengths, roles = np.array([80, 80], np.uint32), np.array([0, 1], np.uint8)
        writer.push(prompt, answers, np.ones(160, np.uint8), lengths, roles, 0, line)
    return writer.finish()


def timed(updater: Updater, budget: int) -> tuple[float, int]:
    """Run one update; return its CPU seconds and its number of micro-batches."""
    settings = FeedSettings(groups_per_update=len(updater.store), token_budget=budget)
    batches = list(Feed(updater.store, settings, depth=0))
    start = process_time()
    updater.update(1, 1e-6, iter(batches))
    return process_time() - start, len(batches)


def measure(arms: dict[str, Updater], budget: int, rounds: int) -> dict[str, Any]:
    """Time an update of each arm in turn, forwards and backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    count = 0
    for updater in arms.values():
        timed(updater, budget)  # the first update allocates
    for round_ in range(rounds):
        for name in list(arms) if round_ % 2 == 0 else list(arms)[::-1]:
            spent, count = timed(arms[name], budget)
            seconds[name].append(spent)
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "micro_batches": count,
        "time_ratio": median(ratios),
        "time_ratios": ratios,
        "seconds": seconds,
    }


def main() -> None:
    """Measure all cases, print them and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = store_of(given.pairs)
    with tempfile.TemporaryDirectory() as folder, RESULTS.open("w") as file:
        AutoModelForCausalLM.from_config(MIXTURE).save_pretrained(folder)
        arms = {}
        for name, value in {"without": 0.0, "with": COEFFICIENT}.items():
            config = TrainConfig(
                folder, "-", "unused", loss="simpo", router_aux_loss_coef=value, precision="fp32"
            )
            policy = load_model(folder).requires_grad_()
            arms[name] = Updater(config, store, policy, None, "shared")
        for case, budget in BUDGETS.items():
            with ExitStack() as attention:
                for updater in arms.values():
                    attention.enter_context(shared_prompts(transformer(updater.policy)))
                found = measure(arms, budget, given.rounds)
            row = {
                "date": date.today().isoformat(),
                "machine": platform.machine(),
                "torch": torch.__version__,
                "case": case,
                "pairs": given.pairs,
                "rounds": given.rounds,
            }
            print(f"{case}: {found['micro_batches']} micro-batches, {found['time_ratio']:.3f}")
            print(json.dumps(row | found), file=file)


if __name__ == "__main__":
    main()
