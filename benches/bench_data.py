"""Build a store from preference data: against TRL's preparation, and up to 10 million pairs.

    python benches/bench_data.py [--rival-python PATH] [--only NAME …] [--most 10000000]

`prepare` times the real HH pairs (LOGRATIO_SHARED, default ../shared) and 20,000 recombined ones,
ours from the file to the finished store, TRL's `_prepare_dataset` from rows in memory, both without
caches, in new processes, alternating. `ids` streams generated pairs of about 100 token ids from
Parquet, `text` tokenizes recombined pairs; each in a separate process whose peak memory is
measured. Raw rows go to results/data.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from shared_material import GPT2, HH, RIVAL, SHARED, check_shared

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "data.jsonl"
TOKENIZER = (SHARED / GPT2).parent
ROUNDS = 5
IDS_A_FILE = 1_000_000

Row = dict[str, Any]

OURS = """
import json, sys, threading, time
from pathlib import Path
from logratio.data import PreferenceTokenizer, build_store

def memory():
    lines = map(str.split, Path("/proc/self/status").read_text().splitlines())
    return {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}

def watch():
    global anonymous
    while not done.wait(0.02):
        anonymous = max(anonymous, memory()["RssAnon:"])

tokenizer, path, *files = sys.argv[1:]
tokenizer = PreferenceTokenizer.load(tokenizer)
anonymous, done = 0, threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
store, report = build_store(files, tokenizer, path, resume=True)
seconds = time.perf_counter() - start
done.set()
start = time.perf_counter()
type(store).open(path)
open_seconds = time.perf_counter() - start
prompt, (chosen, rejected), _, _ = store.group(0)
print(json.dumps({"seconds": seconds, "open_seconds": open_seconds,
    "rows": report.read, "kept": report.kept, "tokens": store.tokens,
    "peak_anonymous": anonymous, "peak_with_maps": memory()["VmHWM:"],
    "first": {"prompt_ids": prompt.tolist(), "chosen_ids": chosen.tolist(),
              "rejected_ids": rejected.tolist()}}))
"""
"""Samples the memory without mapped files fifty times a second."""


def run(python: str, *words: Any) -> Row:
    """Run a measurement in a separate process."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: Row = json.loads(done.stdout.splitlines()[-1])
    return result


def ours(folder: Path, files: list[Path]) -> Row:
    """Build a store of `files` with this library."""
    path = folder / "out.store"
    row = run(sys.executable, "-c", OURS, TOKENIZER, path, *files)
    path.unlink()
    return row


def real_rows() -> list[dict[str, str]]:
    """Return the HH pairs as strings."""
    from logratio.data.formats import Decoder
    from logratio.data.readers import open_inputs

    decoder, rows = Decoder(), []
    for source, row in next(iter(open_inputs([SHARED / HH]))):
        try:
            (record,) = decoder.decode(row, source).records  # type: ignore[arg-type]
        except ValueError:
            continue  # an empty answer
        chosen, rejected = record.completions
        if not (chosen.context or rejected.context):
            texts = (record.prompt, chosen.answer, rejected.answer)
            rows.append(dict(zip(("prompt", "chosen", "rejected"), map(str, texts), strict=True)))
    return rows


def recombined(rows: list[dict[str, str]], count: int) -> Iterator[dict[str, str]]:
    """Recombine prompts and answers of `rows` at random."""
    random = np.random.default_rng(0)
    answers = [row[side] for row in rows for side in ("chosen", "rejected")]
    for _ in range(count):
        chosen, rejected = random.choice(len(answers), 2, replace=False)
        prompt = rows[random.integers(len(rows))]["prompt"]
        yield {"prompt": prompt, "chosen": answers[chosen], "rejected": answers[rejected]}


def write(path: Path, rows: Iterator[dict[str, str]]) -> Path:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def prepare(python: str, folder: Path) -> Iterator[Row]:
    """Time both, alternating, TRL with one and two processes."""
    rows = real_rows()
    sets = {"HH": iter(rows), "HH recombined": recombined(rows, 20_000)}
    for name, drawn in sets.items():
        file = write(folder / "rows.jsonl", drawn)
        mine, theirs = [], {1: [], 2: []}  # type: tuple[list[Row], dict[int, list[Row]]]
        for _ in range(ROUNDS):
            mine.append(ours(folder, [file]))
            for processes, found in theirs.items():
                script = HERE / "rival_prepare.py"
                found.append(run(python, script, file, TOKENIZER, processes))
        first = theirs[1][0]["first"]
        if mine[0]["first"] != first:
            sys.exit(f"the first row differs:\n{mine[0]['first']}\n{first}")
        count = mine[0]["rows"]
        rates = [
            count / median(row["seconds"] for row in part) for part in (mine, *theirs.values())
        ]
        yield {
            "what": "prepare", "data": name, "rows": count, "against": "trl 1.16.0",
            "ours_rows_per_second": rates[0], "theirs_1_process": rates[1],
            "theirs_2_processes": rates[2], "ratio": rates[0] / max(rates[1:]),
            "ours_seconds": [row["seconds"] for row in mine],
            "theirs_seconds": {n: [row["seconds"] for row in part] for n, part in theirs.items()},
        }  # fmt: skip


def ids_file(path: Path, count: int, seed: int) -> Path:
    """Write generated pairs of about 100 token ids as Parquet."""
    random = np.random.default_rng(seed)
    columns = []
    for mean in (50, 25, 25):
        lengths = random.integers(mean // 2, mean * 3 // 2 + 1, count)
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        ids = pa.array(random.integers(0, 50_000, offsets[-1], dtype=np.int32))
        columns.append(pa.ListArray.from_arrays(pa.array(offsets), ids))
    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    pq.write_table(pa.table(columns, names=names), path, compression="none", use_dictionary=False)
    return path


def scale(name: str, sizes: list[int], folder: Path) -> Iterator[Row]:
    """Time one kind of data at growing sizes."""
    rows = real_rows() if name == "text" else []
    for count in sizes:
        data = folder / f"{name}-{count}"
        data.mkdir()
        if name == "text":
            files = [write(data / "rows.jsonl", recombined(rows, count))]
        else:
            starts = range(0, count, IDS_A_FILE)
            files = [
                ids_file(data / f"{start:08}.parquet", min(IDS_A_FILE, count - start), start)
                for start in starts
            ]
        row = ours(folder, files)
        row.pop("first")
        for file in files:
            file.unlink()
        per_pair = row["seconds"] / count
        yield {"what": name, "pairs": count, "microseconds_per_pair": per_pair * 1e6, **row}


def main() -> None:
    """Run the selected measurements, and store the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rival-python", help="an interpreter that has TRL")
    parser.add_argument("--only", nargs="+", choices=("prepare", "ids", "text"))
    parser.add_argument("--most", type=int, default=10_000_000, help="pairs of token ids")
    options = parser.parse_args()
    wanted = options.only or ["prepare", "ids", "text"]
    if wanted != ["ids"]:
        check_shared(GPT2, HH)
    with ExitStack() as stack, RESULTS.open("a") as results:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = options.rival_python
        if "prepare" in wanted and python is None:
            venv.create(folder / "venv", with_pip=True)
            python = str(folder / "venv" / "bin" / "python")
            subprocess.run([python, "-m", "pip", "install", "--quiet", RIVAL], check=True)
        sizes = [size for size in (10**4, 10**5, 10**6, 10**7) if size <= options.most]
        work = {
            "prepare": lambda: prepare(python, folder),
            "ids": lambda: scale("ids", sizes, folder),
            "text": lambda: scale("text", [10**4, 2 * 10**5], folder),
        }
        for name in wanted:
            for row in work[name]():
                row["date"] = date.today().isoformat()
                print(json.dumps({k: v for k, v in row.items() if "_seconds" not in k}), flush=True)
                results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
