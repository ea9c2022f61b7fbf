"""A reimplementation of the DPO paper's code; run by bench_step.py.

    python step_plain.py SPEC.json

Chosen and rejected sequences of an update are one right-padded batch `[2B, T]`. Logits of every
position are computed in float32, then log_softmax and gather. The
reference is a second, frozen model that runs in every step (`{"reference": "frozen"}`), or its sums
are given (`{"reference": "given"}`).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_record import Pair, Recorder, Spec
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

PAD = 0  # its id has no effect: it is masked


@dataclass(frozen=True)
class Rows:
    """An update: int64 `[2B, T]` each, chosen before rejected; sums of the reference `[2B]`."""

    ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    reference: Tensor

    def pairs(self) -> list[Pair]:
        """Read the pairs back from the tensors."""
        return padded_pairs(self.ids, self.attention_mask, self.completion_mask)


def padded_pairs(ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> list[Pair]:
    """Read pairs out of `[2B, T]` tensors, right-padded, chosen before rejected."""
    rows = []
    for row, fed, counts in zip(
        ids.cpu(), attention_mask.cpu(), completion_mask.cpu(), strict=True
    ):
        start, stop = int(counts.argmax()), int(fed.sum())
        rows.append((row[:start].numpy(), row[start:stop].numpy()))
    half = len(rows) // 2
    return [(c[0], c[1], r[1]) for c, r in zip(rows[:half], rows[half:], strict=True)]


def collate(pairs: list[dict[str, Any]], device: str) -> Rows:
    """Pad an update's sequences to the longest."""
    sides = [(p["prompt"], p[name]) for name in ("chosen", "rejected") for p in pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in sides)
    ids = torch.full((len(sides), width), PAD)
    fed, counts = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(sides):
        start, stop = len(prompt), len(prompt) + len(completion)
        ids[row, :stop] = torch.tensor(prompt + completion)
        fed[row, :stop] = 1
        counts[row, start:stop] = 1
    reference = torch.tensor([p["reference"][side] for side in (0, 1) for p in pairs])
    return Rows(*(tensor.to(device) for tensor in (ids, fed, counts, reference)))


def sums(model: nn.Module, rows: Rows) -> Tensor:
    """Return each completion's log-prob, float32 `[2B]`, from whole logits."""
    output = model(input_ids=rows.ids, attention_mask=rows.attention_mask, use_cache=False)
    logits = output.logits[:, :-1].to(torch.float32)
    labels = rows.ids[:, 1:, None]
    tokens = logits.log_softmax(-1).gather(2, labels)[..., 0]
    completions: Tensor = tokens * rows.completion_mask[:, 1:]
    return completions.sum(-1)


def cosine(done: int, updates: int) -> float:
    """Return the factor of the learning rate of update `done` (from 0)."""
    return 0.5 * (1 + math.cos(math.pi * done / updates))


class PlainTrainer:
    """The policy, its optimizer, and the reference if it is a model."""

    def __init__(self, spec: Spec, record: Recorder) -> None:
        self.spec, self.record = spec, record
        self.policy = self._load()
        record.loaded(self.policy)
        is_frozen = spec.settings["reference"] == "frozen"
        self.reference = self._load().requires_grad_(False) if is_frozen else None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=spec.lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: cosine(done, spec.updates)
        )

    def _load(self) -> nn.Module:
        path = Path(self.spec.material) / "model"
        model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=self.spec.weights)
        return model.to(self.spec.device).eval()  # it has no dropout; eval() makes sure

    def update(self, pairs: list[dict[str, Any]]) -> None:
        """Do one update."""
        self.optimizer.zero_grad(set_to_none=True)
        rows = collate(pairs, self.spec.device)
        self.record.fed(rows.pairs)
        with torch.autocast(self.spec.device, torch.bfloat16, self.spec.precision == "bf16"):
            policy = sums(self.policy, rows)
            reference = self._reference_sums(rows)
        chosen, rejected = (policy - reference).chunk(2)
        loss = -logsigmoid(self.spec.beta * (chosen - rejected)).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        means = [part.mean().item() for part in policy.detach().chunk(2)]
        self.record.updated(loss.item(), means[0], means[1], norm.item())

    def _reference_sums(self, rows: Rows) -> Tensor:
        if self.reference is None:
            return rows.reference
        with torch.no_grad():
            return sums(self.reference, rows)


def run(spec: Spec) -> None:
    """Train on the material, and write the record."""
    record = Recorder(spec)
    trainer = PlainTrainer(spec, record)
    lines = (Path(spec.material) / f"{spec.order}.jsonl").read_text().splitlines()
    updates = [json.loads(line) for line in lines]
    record.begin()
    for pairs in updates:
        trainer.update(pairs)
    record.write()


if __name__ == "__main__":
    run(Spec.from_command_line())
