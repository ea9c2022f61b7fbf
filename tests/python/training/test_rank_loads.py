"""Loads of ranks: every token of an update on exactly one rank, as the planner shares it out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import store_of

from logratio.data.feed import lay_out
from logratio.errors import ConfigError
from logratio.training import TrainConfig, rank_loads
from logratio.training.rank_loads import Load, load_of, total

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GROUPS = [(5 + line % 40, [3 + line % 11, 20 - line % 13]) for line in range(96)]


def config(tmp_path: Path, **more: int) -> TrainConfig:
    given = {"batch_size": 24, "token_budget": 200} | more
    return TrainConfig(tmp_path, "data", "out", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_ranks_have_all_tokens_of_an_update(ranks: int, tmp_path: Path) -> None:
    store = store_of(*GROUPS)
    updates = rank_loads.rank_loads(config(tmp_path), store, ranks, CPU)
    assert len(updates) == 4
    assert all(len(update) == ranks for update in updates)
    whole = total([micro for update in updates for rank in update for micro in rank])
    assert whole == load_of([[prompt, *completions] for prompt, completions in GROUPS])
    micros = [micro for update in updates for rank in update for micro in rank]
    assert all(micro.tokens <= 200 for micro in micros)


def test_more_ranks_are_balanced_by_the_planner(tmp_path: Path) -> None:
    for update in rank_loads.rank_loads(config(tmp_path), store_of(*GROUPS), 4, CPU):
        tokens = [total(rank).tokens for rank in update]
        assert max(tokens) < 1.15 * sum(tokens) / 4


def test_rows_are_padded_on_a_gpu(tmp_path: Path) -> None:
    updates = rank_loads.rank_loads(config(tmp_path), store_of(*GROUPS), 2, CUDA)
    assert all(m.tokens % 128 == 0 for update in updates for rank in update for m in rank)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
                min_size=1, max_size=4))  # fmt: skip
def test_pairs_are_those_that_attend(groups: list[tuple[int, list[int]]]) -> None:
    """A token attends to itself, to those before it in its completion, and to its prompt."""
    found = load_of([[prompt, *completions] for prompt, completions in groups])
    store = store_of(*groups)
    pairs = 0
    for prompt, completions in groups:
        segments = np.repeat(np.arange(len(completions) + 1), [prompt, *completions])
        before = np.tril(np.ones((len(segments),) * 2, bool))
        pairs += int((before & ((segments == segments[:, None]) | (segments == 0))).sum())
    assert found.pairs == pairs
    assert found.tokens == lay_out(store, np.arange(len(groups))).input_ids.size
    assert found.targets == sum(sum(completions) for _, completions in groups)


def test_an_update_with_fewer_groups_than_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size 24 for 32 GPUs.*a batch_size of 32 or more"):
        rank_loads.rank_loads(config(tmp_path), store_of(*GROUPS), 32, CPU)
    with pytest.raises(ConfigError, match=r"data of 96 groups for 97 GPUs.*more data"):
        rank_loads.rank_loads(config(tmp_path, batch_size=500), store_of(*GROUPS), 97, CPU)


def test_a_part_of_much_data_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_loads, "PLANNED", 2)
    updates = rank_loads.rank_loads(config(tmp_path), store_of(*GROUPS), 2, CPU)
    assert len(updates) == 2
    monkeypatch.setattr(rank_loads, "UPDATES", 1)
    assert len(rank_loads.rank_loads(config(tmp_path), store_of(*GROUPS), 2, CPU)) == 1


def test_an_incomplete_last_update_does_not_count(tmp_path: Path) -> None:
    updates = rank_loads.rank_loads(config(tmp_path, batch_size=40), store_of(*GROUPS), 2, CPU)
    assert [total([*a, *b]).groups for a, b in updates] == [40, 40]
    (only,) = rank_loads.rank_loads(config(tmp_path, batch_size=500), store_of(*GROUPS), 2, CPU)
    assert total([*only[0], *only[1]]).groups == 96


def test_loads_add_up() -> None:
    assert Load(1, 2, 3, 4) + Load(1, 1, 1, 1) == Load(2, 3, 4, 5)
    assert total([]) == Load()
