"""The reference pass against TRL's, and with everything cached.

    python benches/bench_precompute.py [--rival-python PATH] [--only NAME …] [--pairs 400]

The same pairs, model and threads, in new processes, alternating. Ours is timed from the open store
to the finished cache, including loading the model and all start-up checks; TRL's is timed with its
model in memory, at its default batch of 8 and at larger ones. `hh` are real HH pairs with a model
of random weights and GPT-2's vocabulary, `stories` real pairs of short stories with a trained model
of 3 million parameters (LOGRATIO_SHARED, default ../shared). The sums of both must agree. Raw rows
go to results/precompute.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from shared_material import GPT2, HH, SHARED, STORIES, STORIES3M, check_shared, rival_python
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "precompute.jsonl"
ROUNDS = 3
BATCHES = (8, 32)

Row = dict[str, Any]

OURS = """
import json, sys, time
import numpy as np
from logratio._rust import CacheReader
from logratio.training import PrecomputeConfig
from logratio.training.precomputation import prepare

rows, model, cache = sys.argv[1:]
config = PrecomputeConfig(model=model, data=[rows], cache=cache)
seconds, tokens = [], 0
for _ in range(3):
    ready = prepare(config, show_progress=False)
    start = time.perf_counter()
    result = ready.run()
    seconds.append(time.perf_counter() - start)
    tokens += result.tokens
reader = CacheReader.open(result.folder, ready.fingerprint.digest)
_, sums = reader.read_sums(reader.join(ready.store.keys()))
print(json.dumps({"seconds": seconds[0], "again": min(seconds[1:]), "tokens": tokens,
                  "sums": np.asarray(sums).reshape(-1, 2).tolist()}))
"""


def hh_material(folder: Path, pairs: int) -> tuple[Path, Path]:
    """Write real pairs, and a GPT-2 of four layers and random weights with its tokenizer."""
    from logratio.data import PreferenceTokenizer, build_store

    model = folder / "model"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=256, n_head=4)).save_pretrained(model)
    for file in (SHARED / GPT2).parent.glob("*.json"):
        if file.name != "config.json":
            (model / file.name).write_bytes(file.read_bytes())
    tokenizer = PreferenceTokenizer.load(model)
    store, _ = build_store([SHARED / HH], tokenizer)
    return model, decoded(store, tokenizer, folder / "rows.jsonl", pairs)


def decoded(store: Any, tokenizer: Any, path: Path, pairs: int) -> Path:
    """Write groups as text of one turn each, which both sides tokenize alike."""
    chosen = np.linspace(0, len(store) - 1, pairs).astype(int)
    with path.open("w") as file:
        for group in chosen:
            prompt, completions, *_ = store.group(int(group))
            texts = [tokenizer.decode(ids) for ids in (prompt, *completions)]
            names = ("prompt", "chosen", "rejected")
            file.write(json.dumps(dict(zip(names, texts, strict=True))) + "\n")
    return path


def stories_material(folder: Path, pairs: int) -> tuple[Path, Path]:
    """Return the first pairs of stories, and the model trained on such stories."""
    path = folder / "rows.jsonl"
    lines = (SHARED / STORIES).read_text().splitlines()[:pairs]
    rows = [json.loads(line) for line in lines]
    kept = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return (SHARED / STORIES3M).parent, path


MATERIAL = {"hh": hh_material, "stories": stories_material}
NEEDED = {"hh": (GPT2, HH), "stories": (STORIES, STORIES3M)}
"""Files in the shared folder."""


def run(command: list[str]) -> Row:
    """Run a process; return its last line as JSON."""
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: Row = json.loads(done.stdout.splitlines()[-1])
    return result


def bench(name: str, rival: str, pairs: int) -> Iterator[Row]:
    """Yield the seconds of both sides, alternating."""
    with tempfile.TemporaryDirectory() as temporary:
        model, rows = MATERIAL[name](Path(temporary), pairs)
        for turn in range(ROUNDS):
            cache = str(Path(temporary) / f"cache-{turn}")
            ours = run([sys.executable, "-c", OURS, str(rows), str(model), cache])
            sums = np.array(ours.pop("sums"))
            yield {"name": name, "turn": turn, "side": "ours", "pairs": len(sums)} | ours
            for batch in BATCHES:
                script = str(HERE / "rival_precompute.py")
                theirs = run([rival, script, str(rows), str(model), str(batch)])
                gap = float(np.abs(sums - np.array(theirs["sums"])).max())
                yield {
                    "name": name,
                    "turn": turn,
                    "side": f"TRL, batch {batch}",
                    "pairs": len(theirs["sums"]),
                    "seconds": theirs["seconds"],
                    "largest_difference": gap,
                }


def summarize(rows: list[Row]) -> None:
    """Print medians and ratios."""
    for name in sorted({row["name"] for row in rows}):
        own = [row for row in rows if row["name"] == name]
        ours = [row for row in own if row["side"] == "ours"]
        seconds = median(row["seconds"] for row in ours)
        again = median(row["again"] for row in ours)
        print(f"{name}: ours {seconds:.2f} s, again {again:.4f} s ({seconds / again:,.0f} times)")
        for side in sorted({row["side"] for row in own} - {"ours"}):
            theirs = [row for row in own if row["side"] == side]
            value = median(row["seconds"] for row in theirs)
            gap = max(row["largest_difference"] for row in theirs)
            print(f"{name}: {side} {value:.2f} s, {value / seconds:.2f} times ours, {gap:.2g} nats")


def main() -> None:
    """Run the selected benches, and store every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival-python")
    parser.add_argument("--only", nargs="*", choices=MATERIAL, default=list(MATERIAL))
    parser.add_argument("--pairs", type=int, default=400)
    options = parser.parse_args()
    check_shared(*(file for name in options.only for file in NEEDED[name]))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        rival = rival_python(options.rival_python, Path(folder), install=True)
        assert rival is not None
        for name in options.only:
            for row in bench(name, rival, options.pairs):
                rows.append(row)
                print(row, flush=True)
                with RESULTS.open("a") as results:
                    results.write(json.dumps({"date": date.today().isoformat()} | row) + "\n")
    summarize(rows)


if __name__ == "__main__":
    main()
