"""TRL's own preparation of preference rows, timed; run by bench_data.py in TRL's environment.

    python rival_prepare.py ROWS.jsonl TOKENIZER PROCESSES

Prints the seconds of `DPOTrainer._prepare_dataset`, rows in memory, nothing cached, and the ids of
the first row.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import datasets
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Prepare once."""
    file, folder, processes = sys.argv[1:]
    rows = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = SimpleNamespace(_is_vlm=False, _tokenizer=tokenizer)
    trainer._tokenize = lambda *given, **named: DPOTrainer._tokenize(trainer, *given, **named)
    config = DPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False)
    config.dataset_num_proc = int(processes) if int(processes) > 1 else None
    datasets.disable_caching()
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(rows)
    with contextlib.redirect_stdout(io.StringIO()):
        start = perf_counter()
        prepared = DPOTrainer._prepare_dataset(trainer, table, tokenizer, config, "train")
        seconds = perf_counter() - start
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    first = {name: prepared[0][name] for name in names}
    print(json.dumps({"seconds": seconds, "rows": len(prepared), "first": first}))


if __name__ == "__main__":
    main()
