"""Speed of a run: tokens and pairs per second, share of the peak, tokens saved, memory.

All counts come from the layouts on the host and from the clock, so no figure makes the host wait
for a GPU. An update ends with such a wait for its metrics, so the clock sees whole updates.
"""

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from logratio._rust import PaddedLayout, TreeLayout
from logratio.data.feed import MicroBatch
from logratio.logps.completion import transformer
from logratio.training.accelerators import known_gpu
from logratio.training.config import Precision
from logratio.training.memory import flops_per_second

WINDOW = 20
"""Number of updates that the progress line averages over."""


def peak_flops(device: torch.device, setting: str | None, precision: Precision) -> float:
    """Return the FLOPs per second that MFU is relative to.

    For bfloat16 on a known GPU it is the value in its data sheet; otherwise the measured speed of
    a large matrix product, as in the forecast.

    Args:
        device: The device of the run.
        setting: The device as the settings name it, or None.
        precision: Precision of the run.
    """
    on_gpu = device.type == "cuda" and precision != "fp32"
    known = known_gpu(torch.cuda.get_device_name(device)) if on_gpu else None
    return known.flops if known else flops_per_second(setting, precision)


@dataclass(frozen=True)
class Work:
    """FLOPs of an update of a model: see `Work.flops`.

    Attributes:
        body: FLOPs per token, outside embeddings and head.
        head: FLOPs per token of a completion, where logits are computed.
    """

    body: float
    head: float

    @classmethod
    def of(cls, policy: nn.Module) -> "Work":
        """Count 2 FLOPs per weight and token forward, 2 backward, and 2 more if it is trained.

        For full fine-tuning these are 6 per weight (Kaplan et al. 2020, arXiv 2001.08361, section
        2.1). The input embedding is a lookup and counts none; attention counts its projections
        only; what is computed again for activation checkpointing counts none.
        """
        inner = transformer(policy)
        head = _weights(inner.get_output_embeddings())
        apart = head | _weights(inner.get_input_embeddings())
        body = {p for p in policy.parameters() if p not in apart}
        return cls(_flops(body), _flops(head))

    def flops(self, tokens: int, targets: int) -> float:
        """Return the FLOPs for `tokens` computed tokens, `targets` of them in completions."""
        return self.body * tokens + self.head * targets


def _weights(module: nn.Module | None) -> set[nn.Parameter]:
    return set() if module is None else set(module.parameters())


def _flops(weights: Iterable[nn.Parameter]) -> float:
    return sum(sum(flops_of_passes(p)) for p in weights)


def flops_of_passes(weight: nn.Parameter) -> tuple[float, float]:
    """Return the FLOPs per token of a weight in the forward and in the backward pass."""
    return 2.0 * weight.numel(), (4.0 if weight.requires_grad else 2.0) * weight.numel()


@dataclass
class Count:
    """What an update computes.

    Attributes:
        groups: Groups of the update: pairs, or demonstrations.
        tokens: Tokens computed, without padding.
        rows: Tokens that one row of prompt and completion for each completion would have.
        targets: Tokens of completions.
        seconds: Time from the first request for a micro-batch to the metrics.
    """

    groups: int = 0
    tokens: int = 0
    rows: int = 0
    targets: int = 0
    seconds: float = 0.0

    def add(self, micro: MicroBatch) -> MicroBatch:
        """Count a micro-batch, and return it."""
        layout = micro.layout
        prompts, sizes = layout.prompt_lengths, layout.group_sizes
        targets = int(layout.completion_lengths.sum())
        rows = int((prompts * sizes).sum()) + targets
        self.groups += len(sizes)
        self.targets += targets
        self.rows += rows
        match layout:
            case PaddedLayout():
                self.tokens += rows
            case TreeLayout():  # has no padding: see `shape_for`
                self.tokens += layout.input_ids.size
            case _:
                self.tokens += int(prompts.sum()) + targets
        return micro

    def over_all(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the counts by their sums over all processes, which `total` computes."""
        counts = torch.tensor([self.groups, self.tokens, self.rows, self.targets])
        self.groups, self.tokens, self.rows, self.targets = total(counts).tolist()


class Speedometer:
    """Measures the updates of a run.

    Args:
        work: FLOPs of the policy.
        peak: FLOPs per second that MFU is relative to.
        device: The device of the run, whose memory is reported.
        total: Sums counts over all processes of the run.
    """

    def __init__(
        self,
        work: Work,
        peak: float,
        device: torch.device,
        total: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
    ) -> None:
        self._work, self._peak, self._device, self._total = work, peak, device, total
        self._recent: deque[Count] = deque(maxlen=WINDOW)
        self._count, self._start = Count(), 0.0
        self._memory, self._looked = 0, -math.inf

    def counted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Begin an update: yield its micro-batches, and count them."""
        self._count, self._start = Count(), time.perf_counter()
        # `map` keeps no micro-batch, so that its buffer is free before the next one is requested.
        return map(self._count.add, batches)

    def figures(self) -> dict[str, float]:
        """End an update, and return its figures by metric name."""
        now = time.perf_counter()
        self._count.seconds = now - self._start
        self._count.over_all(self._total)
        self._recent.append(self._count)
        if now - self._looked > 1.0:  # on some machines the question takes a millisecond
            self._memory, self._looked = peak_memory(self._device), now
        return self._of([self._count]) | {"memory/peak_gb": self._memory / 1e9}

    def note(self) -> str:
        """Return a short text about the recent updates, for the progress line."""
        recent = self._of(list(self._recent))
        rate, saved = recent["speed/tokens_per_second"], 100 * recent["speed/tokens_saved"]
        share, memory = 100 * recent["speed/mfu"], self._memory / 1e9
        return f"{rate:,.0f} tokens/s, {saved:.0f} % saved, {share:.0f} % MFU, {memory:.1f} GB"

    def _of(self, counts: list[Count]) -> dict[str, float]:
        seconds = max(sum(one.seconds for one in counts), 1e-9)
        tokens, rows = (sum(getattr(one, name) for one in counts) for name in ("tokens", "rows"))
        flops = sum(self._work.flops(one.tokens, one.targets) for one in counts)
        return {
            "speed/tokens_per_second": tokens / seconds,
            "speed/pairs_per_second": sum(one.groups for one in counts) / seconds,
            "speed/mfu": flops / seconds / self._peak,
            "speed/tokens_saved": 1 - tokens / max(rows, 1),
        }


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: tensors on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found
