"""Memory and time of an update on one pair with a long prompt, against the forecast.

    python benches/bench_long.py [--tokens 32768] [--models one-head window] [--processes 1 2 4]

Models are random and small, so that the length dominates: one or two layers of width 64. Each case
is one update of the trainer (SimPO, so that there is no second pass) in a new process, on a pair of
random ids with two answers of 200 and 300 tokens. Memory is the peak of the process from the start
of the update, minus its memory with the policy loaded (`above_model`), to compare with the forecast
of the activations (`kept_forecast`, from `kept_bytes`); weights, gradients and optimizer state are
tiny here. Blocks of 64 KiB are returned to the system when they are freed, as those of more than
32 MiB always are, so that the peak is of memory in use and not of holes between blocks.

With several processes, all compute the prompt together (`--context-parallel-size`), and figures are
those of the process with the most. The forecast of the activations is that of one process.

"one-head" has one narrow head, because whole attention takes time with the square of the length.
`--tokens 131072 --models window` takes four CPU minutes per case.
Rows are appended to results/long.jsonl. A case that fails or takes too long is a row without
figures.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_memory import Memory
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from logratio._rust import Store, StoreWriter
from logratio.data import Feed, FeedSettings
from logratio.logps.attention import shared_prompts
from logratio.logps.completion import transformer
from logratio.training import TrainConfig, load_model
from logratio.training.activations import LayerOptions, decoder_layers, layer_options
from logratio.training.memory import kept_bytes, training_forecast
from logratio.training.parallel.context import split_prompts
from logratio.training.parallel.processes import join_processes
from logratio.training.update import Updater

RESULTS = Path(__file__).parent / "results" / "long.jsonl"
ANSWERS = (200, 300)
WORDS = 4096
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2**18,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "plain": LlamaConfig(**SIZES, num_hidden_layers=2),
    "one-head": LlamaConfig(
        **SIZES | {"num_attention_heads": 1, "head_dim": 8}, num_hidden_layers=2
    ),
    "window": MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=4096),
    "capped": Gemma2Config(
        **SIZES, num_hidden_layers=2, sliding_window=4096, query_pre_attn_scalar=32
    ),
}


def store_of(prompt: int) -> Store:
    """Draw one pair."""
    random, writer = np.random.default_rng(0), StoreWriter()
    ids, total = random.integers(0, WORDS, prompt + sum(ANSWERS)).astype(np.int32), sum(ANSWERS)
    lengths, roles = np.array(ANSWERS, np.uint32), np.array([0, 1], np.uint8)
    writer.push(ids[:prompt], ids[prompt:], np.ones(total, np.uint8), lengths, roles, 0, 0)
    return writer.finish()


def one_case(model: str, prompt: int, checkpointing: str) -> dict[str, Any]:
    """Run one update, and return its figures."""
    torch.manual_seed(0)
    store, processes = store_of(prompt), join_processes()
    processes.divide_prompts(processes.count)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(CONFIGS[model]).save_pretrained(folder)
        processes.start_group(torch.device("cpu"))  # only rank 0 of a group could save a model
        config = TrainConfig(
            folder,
            "-",
            "unused",
            loss="simpo",
            batch_size=1,
            precision="fp32",
            activation_checkpointing=checkpointing,  # type: ignore[arg-type]
        )
        forecast = training_forecast(config, store).memory_bytes
        kept = kept_bytes(folder, twice=checkpointing == "all") * int(store.shared_lengths()[0])
        kept /= processes.count
        policy = load_model(folder).requires_grad_()
        updater = Updater(config, store, policy, None, "shared", processes=processes)
        memory, seconds = measured(updater)
    report = memory.report(sum(p.numel() for p in policy.parameters()))
    own = {name: report[name] for name in ("policy", "peak", "above_model")} | seconds
    everyone = processes.share(own)
    figures = {name: max(one[name] for one in everyone) for name in own}
    return {"forecast": forecast, "kept_forecast": kept, **figures}


def measured(updater: Updater) -> tuple[Memory, dict[str, float]]:
    """Run one update; return its memory, and its seconds by two clocks."""
    policy, memory = updater.policy, Memory("cpu")
    twice = updater.config.activation_checkpointing == "all"
    layers = LayerOptions(checkpointed=len(decoder_layers(policy)) if twice else 0)
    settings = FeedSettings(groups_per_update=1, token_budget=2**20)
    batches = list(Feed(updater.store, settings, depth=0))
    memory.mark_policy()
    attention = shared_prompts(transformer(policy))
    with split_prompts(updater), attention, layer_options(policy, layers):
        memory.begin()
        start, cpu = time.perf_counter(), time.process_time()
        updater.update(1, 1e-6, iter(batches))
    memory.end()
    return memory, {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def run_case(
    model: str, prompt: int, checkpointing: str, limit: float, processes: int
) -> dict[str, Any]:
    """Measure one case in new processes; return a reason instead of figures if it fails."""
    several = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)
    start = several if processes > 1 else ()
    call = [sys.executable, *start, __file__, "--case", model, str(prompt), checkpointing]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    try:
        done = subprocess.run(
            call, capture_output=True, text=True, timeout=limit, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure all cases, print them and append them to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768])
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=["one-head", "window"])
    parser.add_argument("--checkpointing", nargs="+", default=["off", "all"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--label", default="now", help="name of the code that is measured")
    parser.add_argument("--limit", type=float, default=400, help="seconds for a case")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        model, prompt, checkpointing = given.case
        figures = one_case(model, int(prompt), checkpointing)
        if join_processes().is_first:
            print(json.dumps(figures), flush=True)
        return
    cases = product(given.models, given.tokens, given.checkpointing, given.processes)
    for model, prompt, checkpointing, processes in cases:
        row = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "label": given.label,
            "load": os.getloadavg()[0],
            "model": model,
            "prompt": prompt,
            "checkpointing": checkpointing,
            "processes": processes,
        }
        row |= run_case(model, prompt, checkpointing, given.limit, processes)
        print(json.dumps(row), flush=True)
        with RESULTS.open("a") as file:
            print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
