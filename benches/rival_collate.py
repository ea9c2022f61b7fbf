"""A server for TRL's collator in TRL's environment; `bench_collate.py` starts it.

Reads commands from standard input, one JSON list a line, and answers with one JSON value a line:
["load", file of rows], ["time", row numbers], ["save", row numbers, file to write].
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch


def main() -> None:
    """Answer until the input ends."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    torch.set_num_threads(1)
    collate = DataCollatorForPreference(pad_token_id=0)
    rows: list[dict[str, list[int]]] = []
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: Any
        if command == "load":
            rows = json.loads(Path(arguments[0]).read_text())
            answer = {name: version(name) for name in ("trl", "torch", "transformers")}
        else:
            examples = [rows[row] for row in arguments[0]]
            start = perf_counter()
            batch = collate(examples)
            answer = perf_counter() - start
            if command == "save":
                names = ("input_ids", "attention_mask", "completion_mask")
                torch.save({name: batch[name] for name in names}, arguments[1])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
