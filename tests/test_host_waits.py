"""Operations for which a host would wait for a GPU, counted on a CPU while a loss is made."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from oracle import Group
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.logps.checks import batch_of
from logratio.training import TrainConfig
from logratio.training.objective import CHOSEN, REJECTED, make_objective

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
"""What reads a value, or makes a tensor whose size is a value."""
ALLOWED = 8
"""Of a part of a micro-batch, today: six columns are picked with a boolean mask (objective.py), and
two of them want gradients. The aim is none: the host knows which is chosen."""


class HostWaits(TorchDispatchMode):
    """Counts them by name; indexing with a boolean mask looks for what is True."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indices = args[1] if name.startswith("aten::index") and len(args) > 1 else ()
        masks = [
            index
            for index in (indices if isinstance(indices, list | tuple) else ())
            if isinstance(index, Tensor) and index.dtype == torch.bool
        ]
        if name in WAITING or masks:
            self.found[f"{name} with a mask" if masks else name] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits() -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with HostWaits() as waits:
        values.sum() + values[torch.tensor([0, 2])].mean()
        assert not waits.found
        values[mask].sum().item()
    assert waits.found == {"aten::index with a mask": 1, "aten::_local_scalar_dense": 1}


def test_a_loss_waits_no_more_than_it_does_today(tmp_path: Path) -> None:
    groups: list[Group] = [([3, 4], [[5, 6], [7]]), ([8], [[9], [10, 11, 12]])]
    targets = batch_of(groups, "shared").targets
    targets.roles.copy_(torch.tensor([CHOSEN, REJECTED] * 2))
    objective = make_objective(TrainConfig(tmp_path, [], tmp_path), beta=0.1)
    policy = torch.linspace(-3, -1, 4, requires_grad=True)
    with HostWaits() as waits:
        losses, _ = objective(policy, torch.full((4,), -2.0), targets)
        losses.sum().backward()
    assert len(losses) == 2
    assert sum(waits.found.values()) <= ALLOWED, waits.found
