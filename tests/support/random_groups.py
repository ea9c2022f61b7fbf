"""Random groups from a seed."""

import layout_oracle
import numpy as np
import oracle
from tiny_models import VOCABULARY


def random_groups(seed: int) -> list[layout_oracle.Group]:
    random = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return [int(i) for i in random.integers(1, 90, int(random.integers(1, most)))]

    groups: list[layout_oracle.Group] = []
    for _ in range(5):
        answers = [ids(12) for _ in range(int(random.integers(1, 4)))]
        groups.append((ids(20), [(answer, [1] * len(answer), 2) for answer in answers]))
    return groups


def token_groups(seed: int = 0, completions: int = 2) -> list[oracle.Group]:
    """Ragged groups; some prompts and completions are longer than the sliding window."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(random.integers(low, high))
        return [int(token) for token in random.integers(1, VOCABULARY, length)]

    return [(ids(1, 40), [ids(1, 30) for _ in range(completions)]) for _ in range(4)]
