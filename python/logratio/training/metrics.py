"""What a run reports, under the names that dashboards know."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from logratio.durable import write_whole
from logratio.training.losses import PairLogps, PairRewards, gradient_weight


def pair_metrics(losses: Tensor, pairs: PairLogps, rewards: PairRewards) -> dict[str, Tensor]:
    """Add up each metric over the pairs, on their device: float64 scalars by name.

    A tie counts half towards the accuracy: at the start, when every margin is 0, it is 0.5.
    Log-ratios are left out where there is no reference.
    """
    chosen, rejected = rewards
    columns = {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": accuracies(chosen, rejected),
        "logps/chosen": pairs.policy_chosen_logps,
        "logps/rejected": pairs.policy_rejected_logps,
        "lengths/chosen": pairs.chosen_lengths,
        "lengths/rejected": pairs.rejected_lengths,
        "gradient_weight": gradient_weight(chosen, rejected),
    }
    if pairs.has_reference:
        columns["logratios/chosen"] = pairs.chosen_logratios
        columns["logratios/rejected"] = pairs.rejected_logratios
    return _sums(columns)


def accuracies(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where chosen is above rejected, 0.5 where they tie, else 0: `[B]`."""
    return (torch.sign(chosen - rejected) + 1) / 2


def demonstration_metrics(losses: Tensor, logps: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Add up each metric over the demonstrations: float64 scalars by name."""
    return _sums({"loss": losses, "logps/chosen": logps, "lengths/chosen": lengths})


def _sums(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.detach().double().sum() for name, column in columns.items()}


def added(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Add up the sums of several parts of an update."""
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


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
