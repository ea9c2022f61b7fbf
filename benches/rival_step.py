"""TRL's DPOTrainer on the material of bench_step.py, instrumented; run by it.

    python rival_step.py SPEC.json

The trainer gets the same ids (without its tokenization) in the order of the file, and computes its
reference log-probs before training (`precompute_ref_log_probs`). All other settings are TRL's
defaults; `config` in the arm's settings are fields of DPOConfig, and
`micro_batch` is its batch per device, with a default of 8 if an update has more pairs.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import datasets
import torch
import trl
from step_plain import PAD, padded_pairs
from step_record import Recorder, Spec
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

DEFAULT_BATCH = 8


class Watched(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer with overridden methods that record what it does."""

    def __init__(self, record: Recorder, *given: Any, **named: Any) -> None:
        self.record = record
        self.reference_seconds = 0.0
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        super().__init__(*given, **named)

    def _prepare_dataset(self, dataset: Any, *given: Any) -> Any:
        return dataset  # they are ids already

    def _precompute_ref_logps(self, *given: Any) -> Any:
        start = perf_counter()
        scored = super()._precompute_ref_logps(*given)
        self.reference_seconds += perf_counter() - start
        return scored

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        """Record the loss and its inputs."""
        names = ("input_ids", "attention_mask", "completion_mask")
        self.record.fed(partial(padded_pairs, *(inputs[name] for name in names)))
        loss = super().compute_loss(model, inputs, *given, **named)
        self._losses.append(loss.detach())
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._norm = super()._clip_grad_norm(model)
        return self._norm

    def end_update(self) -> None:
        """Record the update's means; micro-batches have equal sizes."""
        parts, found = len(self._losses), self._metrics["train"]
        means = [sum(found[f"logps/{side}"][-parts:]) / parts for side in ("chosen", "rejected")]
        loss = float(torch.stack(self._losses).mean())
        self.record.updated(loss, means[0], means[1], float(self._norm))
        self._losses.clear()


class Stamps(TrainerCallback):
    """Records the start and end of training and of each update."""

    trainer: Watched

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Start the clock."""
        self.trainer.record.begin()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """Record an update; TRL logs after this, in the time of the next update."""
        self.trainer.end_update()


def arguments(spec: Spec, output: str) -> DPOConfig:
    """Return TRL's defaults with the settings of all arms and of this arm."""
    micro = min(spec.settings.get("micro_batch", DEFAULT_BATCH), spec.batch)
    if spec.batch % micro:
        raise ValueError(f"{spec.batch} pairs an update are no whole number of {micro}")
    common: dict[str, Any] = {
        "output_dir": output,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": spec.device == "cpu",
        "bf16": spec.precision != "fp32",
        "max_length": 1024,
        "beta": spec.beta,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": spec.batch // micro,
        "train_sampling_strategy": "sequential",  # the file's order is the plan's
        "precompute_ref_log_probs": True,
        "disable_tqdm": True,
    }
    return DPOConfig(**common | spec.settings.get("config", {}))


def rows(spec: Spec, output: str) -> datasets.Dataset:
    """Return the pairs in their order, on disk, as TRL's cache of log-probs wants them."""
    lines = (Path(spec.material) / f"{spec.order}.jsonl").read_text().splitlines()
    names = ("prompt", "chosen", "rejected")
    pairs = [{f"{n}_ids": row[n] for n in names} for line in lines for row in json.loads(line)]
    datasets.Dataset.from_list(pairs).save_to_disk(f"{output}/rows")
    return datasets.load_from_disk(f"{output}/rows")


def run(spec: Spec) -> None:
    """Train on the material, and write the record."""
    record = Recorder(spec)
    datasets.disable_progress_bars()
    folder = Path(spec.material) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)  # EOS may be beyond a vocabulary
    policy: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=spec.weights)
    policy = policy.to(spec.device)
    record.loaded(policy)
    with tempfile.TemporaryDirectory() as output:
        stamps = Stamps()
        trainer = stamps.trainer = Watched(
            record,
            policy,
            args=arguments(spec, output),
            train_dataset=rows(spec, output),
            processing_class=tokenizer,
            callbacks=[stamps],
        )
        trainer.train()
    record.write(reference_seconds=trainer.reference_seconds, trl=trl.__version__)


if __name__ == "__main__":
    run(Spec.from_command_line())
