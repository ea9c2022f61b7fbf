"""`Store.plan` equals an independent planner."""

from typing import Any

import numpy as np
import pytest
from plan_oracle import Request, planned
from planned_stores import make_store

from logratio._rust import Store
from logratio.data.feed import micro_batches


def found(store: Store, **request: Any) -> list[list[list[int]]]:
    plan = store.plan(**request)
    updates = len(plan.update_offsets) - 1
    return [[part.tolist() for part in micro_batches(plan, at)] for at in range(updates)]


@pytest.mark.parametrize("order", ["length_grouped", "shuffled", "sorted"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_plan_equals_the_oracles(order: str, mixed: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 400))
    lengths = [int(n) for n in random.integers(2, 60, count)]
    files = [int(n) for n in random.integers(0, 4, count)]
    dataset_of_file, weights = [0, 1, 0, 2], [1.0, float(random.uniform(0, 5)), 0.3]
    if mixed:
        files[:3] = [0, 1, 3][: len(files)]
        used = {dataset_of_file[file] for file in files}
        weights = [w if d in used else 0.0 for d, w in enumerate(weights)]
    store = make_store(lengths, files)
    mixture: dict[str, Any] = {}
    if mixed:
        mixture["weights"] = np.array(weights)
        mixture["datasets"] = np.array(dataset_of_file, np.uint32)
    for epoch in (0, 3):
        sizes = {"groups_per_update": 1 + seed * 5, "token_budget": 60 + 40 * seed}
        request = {"order": order, "seed": seed, "epoch": epoch, **sizes}
        expected = planned(
            Request(
                lengths,
                **request,  # type: ignore[arg-type]
                weights=weights if mixed else None,
                dataset_of=[dataset_of_file[file] for file in files] if mixed else None,
            )
        )
        assert found(store, **request, **mixture) == expected


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"weights": np.ones(1)}, "come together"),
        ({"weights": np.ones(1), "datasets": np.zeros(1, np.uint32)}, "file 1 is in no dataset"),
        (
            {"weights": np.array([1.0, np.nan]), "datasets": np.zeros(2, np.uint32)},
            "weights must be at least 0",
        ),
        ({"attention_cost": -1.0}, "attention_cost"),
    ],
)
def test_an_impossible_mixture_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    store = make_store([4, 5, 6], [0, 1, 1])
    with pytest.raises(ValueError, match=sentence):
        store.plan(order="sorted", groups_per_update=2, token_budget=9, **wrong)


def test_a_large_plan_does_not_depend_on_threads() -> None:
    lengths = [2 + 7919 * n % 97 for n in range(70_000)]
    request = Request(lengths, "length_grouped", 1, 0, 64, 512)
    store = make_store(lengths)
    plan = store.plan(order="length_grouped", seed=1, groups_per_update=64, token_budget=512)
    updates = planned(request)
    assert plan.order.tolist() == [group for update in updates for one in update for group in one]
