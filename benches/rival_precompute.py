"""TRL's own precompute pass over preference rows, timed; run by bench_precompute.py.

    python rival_precompute.py ROWS.jsonl MODEL BATCH

Prints the seconds of `DPOTrainer._precompute_ref_logps` (the model is in memory, the rows are
tokenized, nothing is cached) and the sums that it made.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Run the pass once."""
    file, folder, batch = sys.argv[1:]
    rows = [json.loads(line) for line in Path(file).read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    datasets.disable_progress_bars()
    seconds = []
    inner = DPOTrainer._precompute_ref_logps

    def timed(*given: object) -> datasets.Dataset:
        start = perf_counter()
        scored = inner(*given)
        seconds.append(perf_counter() - start)
        return scored

    DPOTrainer._precompute_ref_logps = timed
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        table = datasets.Dataset.from_list(rows)
        table.save_to_disk(f"{output}/rows")  # a table in memory is never cached
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            args=DPOConfig(
                output_dir=output,
                report_to="none",
                use_cpu=True,
                bf16=False,
                max_length=1024,
                gradient_checkpointing=False,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=int(batch),
            ),
            train_dataset=datasets.load_from_disk(f"{output}/rows"),
            processing_class=tokenizer,
        )
        scored = trainer.train_dataset
    pairs = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in scored]
    print(json.dumps({"seconds": sum(seconds), "sums": pairs}))


if __name__ == "__main__":
    main()
