"""Utilisation, speed and scaling of the planner, the layouts and the feed, against TRL's collator.

    python benches/bench_collate.py [--rival-python PATH] [--only NAME …] [--most 10000000]

`--rival-python` is an interpreter with TRL; without it, one is created in a temporary folder. Real
lengths come from the HH pairs in LOGRATIO_SHARED (default ../shared). Every measurement is a row of
results/collate.jsonl; times are of one thread unless stated otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from shared_material import GPT2, HH, LLAMA_FACTORY, RIVAL, SHARED, check_shared

from logratio._rust import Store, StoreWriter
from logratio.data import Feed, FeedSettings, PreferenceTokenizer, build_store
from logratio.data.feed import BufferPool, lay_out

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "collate.jsonl"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARRAYS = ("input_ids", "attention_mask", "token_mask")
SIZES = (8, 64, 512)
BUDGETS = (1024, 2048, 4096, 8192, 16384)

Row = dict[str, Any]


def real_store(name: str = HH) -> Store:
    """Tokenize real pairs."""
    tokenizer = PreferenceTokenizer.load((SHARED / GPT2).parent, chat_template=CHATML)
    store, _ = build_store([SHARED / name], tokenizer)
    return store


def wholly_counted(store: Store) -> np.ndarray:
    """Return the groups without masked tokens: TRL has no mask for them."""
    parts = np.add.reduceat(
        store.completion_lengths() - store.counted_lengths(), store.completion_offsets()[:-1]
    )
    return np.flatnonzero(parts == 0)


def store_of_pairs(count: int, prompt: int, answer: int, folder: Path) -> Store:
    """Write `count` generated pairs, with lengths between 0.5 and 1.5 times the tokens."""
    random = np.random.default_rng(0)
    writer = StoreWriter(folder / f"{count}.store")
    for start in range(0, count, 65536):
        groups = min(65536, count - start)
        prompts = random.integers(prompt // 2, prompt * 3 // 2 + 1, groups, dtype=np.uint32)
        answers = random.integers(answer // 2, answer * 3 // 2 + 1, 2 * groups, dtype=np.uint32)
        tokens = int(answers.sum())
        writer.push_many(
            random.integers(0, 50_000, int(prompts.sum()), dtype=np.int32),
            prompts,
            random.integers(0, 50_000, tokens, dtype=np.int32),
            np.ones(tokens, np.uint8),
            answers,
            np.full(groups, 2, np.uint32),
            np.tile(np.array([0, 1], np.uint8), groups),
            np.zeros(groups, np.uint32),
            np.arange(start, start + groups, dtype=np.uint64),
        )
    return writer.finish()


def best(work: Callable[[], object], least: float = 0.3, times: int = 3) -> float:
    """Return the shortest of at least `times` runs, over at least `least` seconds."""
    taken: list[float] = []
    while len(taken) < times or sum(taken) < least:
        start = perf_counter()
        work()
        taken.append(perf_counter() - start)
    return min(taken)


def fullness() -> Iterator[Row]:
    """Measure the utilisation of micro-batches of 64 real pairs per update, and its bound."""
    for name, order in product((HH, LLAMA_FACTORY), ("length_grouped", "shuffled")):
        store = real_store(name)
        lengths = store.shared_lengths().astype(np.int64)
        for budget in BUDGETS:
            plan = FeedSettings(groups_per_update=64, token_budget=budget, order=order).plan(
                store, 0
            )
            updates = len(plan.update_offsets) - 1 - (len(store) % 64 > 0)  # the full ones
            batches = int(plan.update_offsets[updates])
            tokens = lengths[plan.order[: 64 * updates]]
            each = tokens.reshape(updates, 64).sum(axis=1)
            held = np.add.reduceat(tokens, plan.micro_offsets[:batches])
            held = np.minimum(held, budget)  # a group above the budget is a separate batch
            fewest = int(np.ceil(each / budget).sum())
            yield {
                "what": "fullness", "data": name, "order": order, "token_budget": budget,
                "updates": updates,
                "mean_tokens_per_update": float(each.mean()), "micro_batches": batches,
                "full": float(held.mean() / budget),
                "bound": min(1.0, float(held.sum() / (fewest * budget))),
                "longest": int(lengths.max()),
            }  # fmt: skip


@contextmanager
def rival(python: str | None, rows: Path) -> Iterator[Callable[..., Any]]:
    """Start TRL's collator, in a new environment if none is given."""
    with tempfile.TemporaryDirectory() as folder:
        if python is None:
            venv.create(Path(folder) / "venv", with_pip=True)
            python = str(Path(folder) / "venv" / "bin" / "python")
            subprocess.run([python, "-m", "pip", "install", "--quiet", RIVAL], check=True)
        command = [python, str(HERE / "rival_collate.py")]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
        ) as running:
            assert running.stdin is not None
            assert running.stdout is not None
            reading, writing = running.stdout, running.stdin

            def ask(*words: Any) -> Any:
                print(json.dumps(words), file=writing, flush=True)
                return json.loads(reading.readline())

            print("beside", ask("load", str(rows)))
            yield ask
            writing.close()


def check_equal(store: Store, groups: np.ndarray, ask: Callable[..., Any], file: Path) -> None:
    """Compare the three tensors, element by element."""
    ask("save", groups.tolist(), str(file))
    theirs = torch.load(file, weights_only=True)
    ours = lay_out(store, groups, "padded", fields=ARRAYS)
    for name, own in zip(theirs, ARRAYS, strict=True):
        if not torch.equal(theirs[name], torch.from_numpy(getattr(ours, own))):
            sys.exit(f"{name} differs from TRL's at {len(groups)} pairs")


def collation(python: str | None, blocks: int = 12) -> Iterator[Row]:
    """Time both for the same padded tensors, alternating, and a copy of as many bytes."""
    store, random = real_store(), np.random.default_rng(0)
    usable = wholly_counted(store)
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows.json"
        rows.write_text(json.dumps([row_of(store, number) for number in range(len(store))]))
        with rival(python, rows) as ask:
            for size in SIZES:
                groups = random.choice(usable, size, replace=False)
                check_equal(store, groups, ask, Path(name) / "theirs.pt")
                yield compare(store, groups, ask, blocks)


def row_of(store: Store, number: int) -> dict[str, list[int]]:
    """Return a pair in the format of TRL's collator."""
    prompt, (chosen, rejected), _, _ = store.group(number)
    ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    return {name: array.tolist() for name, array in ids.items()}


def compare(store: Store, groups: np.ndarray, ask: Callable[..., Any], blocks: int) -> Row:
    """Measure one batch with both, alternating."""
    arenas = BufferPool()

    def ours() -> list[torch.Tensor]:
        layout = lay_out(store, groups, "padded", arena=arenas, fields=ARRAYS)
        return [torch.from_numpy(getattr(layout, name)) for name in ARRAYS]

    mask = ours()[1]
    written, real = 3 * mask.nbytes, int(mask.sum())
    source, target = np.ones(written, np.uint8), np.empty(written, np.uint8)
    taken: dict[str, list[float]] = {"ours": [], "theirs": [], "copy": []}
    for _ in range(blocks):
        taken["theirs"].append(ask("time", groups.tolist()))
        taken["ours"].append(best(ours, 0.02))
        taken["copy"].append(best(lambda: np.copyto(target, source), 0.02))
    middle = {name: median(values) for name, values in taken.items()}
    return {
        "what": "collation", "pairs": len(groups), "real_tokens": real, "bytes": written,
        "ours_ns_per_token": middle["ours"] / real * 1e9,
        "theirs_ns_per_token": middle["theirs"] / real * 1e9,
        "ratio": middle["theirs"] / middle["ours"],
        "smallest_ratio": min(taken["theirs"]) / max(taken["ours"]),
        "ours_bytes_per_second": written / middle["ours"],
        "copy_bytes_per_second": written / middle["copy"], "seconds": taken,
    }  # fmt: skip


def bandwidth() -> Iterator[Row]:
    """Compare large batches with a copy of as many bytes: buffer reused, and fresh."""
    store, random = real_store(), np.random.default_rng(0)
    for size in (512, 2048):
        groups = random.choice(len(store), size, replace=False).astype(np.int64)
        for layout in ("padded", "shared"):
            written = lay_out(store, groups, layout).nbytes
            arena, source = np.ones(written, np.uint8), np.ones(written, np.uint8)
            ours = best(lambda: lay_out(store, groups, layout, arena=arena))  # noqa: B023
            fresh = best(lambda: lay_out(store, groups, layout))  # noqa: B023
            copy = best(lambda: np.copyto(arena, source))  # noqa: B023
            yield {
                "what": "bandwidth", "layout": layout, "pairs": size, "bytes": written,
                "ours_bytes_per_second": written / ours,
                "fresh_bytes_per_second": written / fresh,
                "copy_bytes_per_second": written / copy, "share_of_copy": copy / ours,
            }  # fmt: skip


def feeding() -> Iterator[Row]:
    """Feed whole epochs of pairs of 600 tokens: plan, layout, hand-over, torch tensors."""
    from logratio.logps.batch import to_torch

    with tempfile.TemporaryDirectory() as folder:
        store = store_of_pairs(60_000, 300, 150, Path(folder))
        for layout in ("shared", "padded"):
            settings = FeedSettings(groups_per_update=64, token_budget=16384, layout=layout)
            rates = []
            for _ in range(5):
                start = perf_counter()
                for batch in Feed(store, settings):
                    to_torch(batch.layout)
                rates.append(len(store) / (perf_counter() - start) * 60)
            yield {
                "what": "feeding", "layout": layout, "pairs": len(store),
                "mean_tokens": store.tokens / len(store), "pairs_per_minute": max(rates),
                "median_pairs_per_minute": median(rates), "rates": rates,
            }  # fmt: skip


def scaling(most: int) -> Iterator[Row]:
    """Plan and feed stores of growing size: time per group, and memory without mapped files."""
    count = 10_000
    while count <= most:
        with tempfile.TemporaryDirectory() as folder:
            store = store_of_pairs(count, 8, 6, Path(folder))
            store.verify()
            for order in ("length_grouped", "shuffled", "sorted"):
                settings = FeedSettings(groups_per_update=64, token_budget=512, order=order)
                plan = partial(settings.plan, store, 0)
                yield {"what": "planning", "order": order, **per_group(plan, count)}
            settings = FeedSettings(groups_per_update=4096, token_budget=16384)
            yield {
                "what": "feeding all",
                **per_group(lambda: drain(Feed(store, settings)), count),  # noqa: B023
            }
        count *= 10


def per_group(work: Callable[[], object], count: int) -> Row:
    """Return the shortest wall time and the least CPU time, of all threads, of three runs.

    On a shared machine, CPU time is more reliable.
    """
    walls, cpus = [], []
    for _ in range(3):
        start, cpu = perf_counter(), process_time()
        work()
        walls.append(perf_counter() - start)
        cpus.append(process_time() - cpu)
    return {
        "groups": count, "seconds": min(walls), "cpu_seconds": min(cpus),
        "ns_per_group": min(walls) / count * 1e9, "cpu_ns_per_group": min(cpus) / count * 1e9,
        "resident_mib": resident_mib(),
    }  # fmt: skip


def drain(feed: Feed) -> None:
    """Read every batch."""
    for _ in feed:
        pass


def resident_mib() -> float:
    """Return this process's memory without mapped files, on Linux."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(fields["RssAnon"].split()[0]) / 1024


def main() -> None:
    """Measure, print and store the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rival-python", help="an interpreter that has TRL")
    parser.add_argument("--most", type=int, default=10_000_000, help="groups of the largest store")
    names = ("fullness", "collation", "bandwidth", "feeding", "scaling")
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    options = parser.parse_args()
    check_shared(GPT2, HH, *[LLAMA_FACTORY] * ("fullness" in options.only))
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "fullness": fullness,
        "collation": lambda: collation(options.rival_python),
        "bandwidth": bandwidth,
        "feeding": feeding,
        "scaling": lambda: scaling(options.most),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    for name in options.only:
        for row in parts[name]():
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {k: v for k, v in row.items() if not isinstance(v, list | dict)}
            print(
                *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
            )


if __name__ == "__main__":
    main()
