"""Groups that begin alike, as trees."""

import numpy as np
import torch
from layout_oracle import store_of as store_of_roles
from oracle import Group
from tiny_models import VOCABULARY
from torch import Tensor

from logratio._rust import Store
from logratio.logps.batch import TreeBatch
from logratio.logps.completion import batch_of


def related_groups(seed: int, count: int = 7) -> list[Group]:
    """Groups that go on from one another's prompts and answers, some longer than any window."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return [int(i) for i in random.integers(1, VOCABULARY, int(random.integers(low, high)))]

    groups: list[Group] = [(ids(9, 40), [ids(1, 30), ids(1, 9)]), (ids(1, 5), [ids(1, 9)] * 2)]
    while len(groups) < count:
        prompt, answers = groups[int(random.integers(len(groups)))]
        answer = answers[0] if random.random() < 0.5 else []
        start = ids(1, 4)  # which its answers have in common
        groups.append((prompt + answer + ids(0, 9), [start + ids(0, 12), ids(1, 9), start]))
    return [groups[at] for at in random.permutation(len(groups)).tolist()]


def store_of(groups: list[Group]) -> Store:
    return store_of_roles([(p, [(ids, [1] * len(ids), 2) for ids in all_]) for p, all_ in groups])


def tree_of(groups: list[Group]) -> TreeBatch:
    batch = batch_of(groups, "tree")
    assert isinstance(batch, TreeBatch)
    return batch


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
