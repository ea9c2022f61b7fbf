"""Input and output of the workers of bench_step.py, the same for every arm.

A worker calls `loaded` with its policy, `begin` before its first update, `fed` with the model's
inputs, and `updated` after each update. The inputs are hashed at the end, outside the measured
time.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from step_memory import Memory
from torch import nn

Ids = Sequence[int] | np.ndarray
Pair = tuple[Ids, Ids, Ids]
"""Ids of the prompt, the chosen and the rejected completion."""


@dataclass(frozen=True)
class Spec:
    """The task of one worker.

    Attributes:
        material: folder that `step_material.make` filled.
        result: file for its measurements.
        arm: name of the arm.
        settings: settings of the arm for its worker.
        order: of the pairs: "shuffled" or "length_grouped".
        batch: pairs an update.
        warmup: updates before the measured ones.
        measured: updates that count.
        beta, lr, seed: of every arm alike; the rate falls from `lr` along a cosine, no warm-up.
        device: "cpu" or "cuda".
        precision: "fp32"; "bf16", autocast over float32 weights; or "bf16-weights".
        threads: of torch.
    """

    material: str
    result: str
    arm: str
    settings: dict[str, Any] = field(default_factory=dict)
    order: str = "shuffled"
    batch: int = 8
    warmup: int = 2
    measured: int = 8
    beta: float = 0.1
    lr: float = 1e-5
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 2

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.warmup + self.measured

    @property
    def weights(self) -> torch.dtype:
        """The dtype of the policy's weights."""
        return torch.bfloat16 if self.precision == "bf16-weights" else torch.float32

    def write(self, path: Path) -> None:
        """Write the file for a worker's command line."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def from_command_line(cls) -> "Spec":
        """Read the file that the command line names, and set the threads."""
        spec = cls(**json.loads(Path(sys.argv[1]).read_text()))
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        return spec


def pair_hash(pairs: Sequence[Pair]) -> str:
    """Hash the ids of the pairs of one update, independent of their order: 16 hex digits."""
    digests = sorted(_digest(pair) for pair in pairs)
    return blake2b(b"".join(digests), digest_size=8).hexdigest()


def _digest(pair: Pair) -> bytes:
    whole = blake2b(digest_size=16)
    for ids in pair:
        array = np.asarray(ids, dtype=np.int32)
        whole.update(len(array).to_bytes(8, "little") + array.tobytes())
    return whole.digest()


class Recorder:
    """The stamps, memory, losses and pairs of one worker's run."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.memory = spec, Memory(spec.device)
        self._stamps: list[float] = []
        self._metrics: list[dict[str, float]] = []
        self._fed: list[list[Callable[[], list[Pair]]]] = [[]]
        self._parameters = 0

    def loaded(self, model: nn.Module) -> None:
        """Note the memory with nothing but the policy in it.

        Every weight is read first: of a file that is mapped, only what was read counts.
        """
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sum()
        self._parameters = sum(parameter.numel() for parameter in model.parameters())
        self.memory.mark_policy()

    def begin(self) -> None:
        """Start the clock and the peak: the next thing is the first update."""
        self.memory.begin()
        self._stamp()

    def fed(self, pairs: Callable[[], list[Pair]]) -> None:
        """Store the model's inputs of the current update; they are hashed at the end."""
        self._fed[-1].append(pairs)

    def updated(self, loss: float, chosen: float, rejected: float, grad_norm: float) -> None:
        """Note the end of an update: mean loss, mean sums of the policy, norm before clipping."""
        self._stamp()
        names = ("loss", "chosen", "rejected", "grad_norm")
        self._metrics.append(dict(zip(names, (loss, chosen, rejected, grad_norm), strict=True)))
        self._fed.append([])
        if self.is_over:
            self.memory.end()

    @property
    def is_over(self) -> bool:
        """Whether all updates are done."""
        return len(self._metrics) == self.spec.updates

    def _stamp(self) -> None:
        if self.spec.device == "cuda":
            torch.cuda.synchronize()
        self._stamps.append(perf_counter())

    def write(self, **more: Any) -> None:
        """Write the record, with whatever else a worker knows.

        Raises:
            RuntimeError: an update is missing.
        """
        if not self.is_over:
            done = len(self._metrics)
            raise RuntimeError(f"{self.spec.arm}: {done} of {self.spec.updates} updates were done")
        record = {
            "arm": self.spec.arm,
            "seconds": np.diff(self._stamps).tolist(),
            "metrics": self._metrics,
            "pairs": [
                pair_hash([pair for part in update for pair in part()]) for update in self._fed[:-1]
            ],
            "memory": self.memory.report(self._parameters),
            "device": _device_name(self.spec.device),
            "threads": torch.get_num_threads(),
            **more,
        }
        partial = Path(f"{self.spec.result}.partial")
        partial.write_text(json.dumps(record))
        partial.replace(self.spec.result)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
