"""What a run reports, under the names that dashboards know."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from logratio.durable import write_whole
from logratio.training.losses import PairLogps, gradient_weight

if TYPE_CHECKING:
    pass

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logratios/chosen",
    "logratios/rejected",
    "lengths/chosen",
    "lengths/rejected",
    "gradient_weight",
)
DEMONSTRATION_METRICS = ("loss", "logps/chosen", "lengths/chosen")


def pair_metrics(losses: Tensor, pairs: PairLogps, beta: float) -> Tensor:
    """Add up each of `PAIR_METRICS` over the pairs, on their device: float32 `[12]`.

    A tie counts half towards the accuracy: at the start, when every margin is 0, it is 0.5.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    columns = (
        losses,
        chosen,
        rejected,
        chosen - rejected,
        accuracies(chosen, rejected),
        pairs.policy_chosen_logps,
        pairs.policy_rejected_logps,
        pairs.chosen_logratios,
        pairs.rejected_logratios,
        pairs.chosen_lengths,
        pairs.rejected_lengths,
        gradient_weight(pairs, beta),
    )
    return torch.stack([column.detach().float().sum() for column in columns])


def accuracies(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where chosen is above rejected, 0.5 where they tie, else 0: float32 `[B]`."""
    return (torch.sign(chosen - rejected) + 1) / 2


def demonstration_metrics(losses: Tensor, logps: Tensor, lengths: Tensor) -> Tensor:
    """Add up each of `DEMONSTRATION_METRICS` over the demonstrations: float32 `[3]`."""
    return torch.stack([column.detach().float().sum() for column in (losses, logps, lengths)])


class MetricsLog:
    """`metrics.jsonl` and TensorBoard's events in the output folder, one row an update."""

    def __init__(self, output: Path, resume_step: int) -> None:
        from tensorboardX import SummaryWriter

        self.path = output / "metrics.jsonl"
        kept = _rows_up_to(self.path, resume_step)
        write_whole(self.path, "".join(kept))
        self._file = self.path.open("a")
        self._board: SummaryWriter = SummaryWriter(
            str(output / "tensorboard"), purge_step=resume_step + 1
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row; every number is finite or the trainer has stopped before."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()


def _rows_up_to(path: Path, step: int) -> list[str]:
    """Return the rows that a resumed run keeps: those of the updates it will not repeat."""
    if step == 0 or not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
