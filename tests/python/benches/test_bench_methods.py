"""What bench_methods.py claims: data by the rule, rows measured once, equal pairs in both arms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_methods import NAMES, VARIANTS, Results, configuration, table
from methods_cost import CostSizes, asked, store_for
from methods_tasks import FILES, BenchTask, Sizes, answers, demonstrations, lists, pairs

from logratio.data import TokenizationRules
from logratio.demo import task
from logratio.demo.run import Candidates
from logratio.training import TrainConfig
from logratio.training.methods.data_checks import check_data
from logratio.training.methods.method import DataKind
from logratio.training.methods.objective import Objective

PROMPT = "Ana the cat went to the river ."
GOOD, PLAIN, BAD = " the cat was happy .", " the cat slept in the river .", " the dog was sad ."
DRAWN = Candidates([PROMPT, PROMPT], [[PLAIN, GOOD, BAD], [PLAIN, PLAIN, PLAIN]])


def objective_of(name: str) -> Objective:
    return Objective.of(TrainConfig("model", "-", "output", loss=name))


def test_data_of_every_kind_follows_the_rule() -> None:
    assert [task.rule(PROMPT, text) for text in (GOOD, PLAIN, BAD)] == [1, 0, -3]
    pair = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD, "margin": 4}
    assert list(pairs(DRAWN)) == [pair]
    assert list(lists(DRAWN)) == [
        {"prompt": PROMPT, "completions": [PLAIN, GOOD, BAD], "scores": [0, 1, -3]}
    ]
    assert list(answers(DRAWN)) == [
        {"prompt": PROMPT, "completion": GOOD, "label": True},
        {"prompt": PROMPT, "completion": BAD, "label": False},
    ]
    assert list(demonstrations(DRAWN)) == [{"prompt": PROMPT, "completion": GOOD}]


def bench_task(name: str, data: dict[DataKind, Path]) -> BenchTask:
    sizes = Sizes(1, 8, 1e-4, samples=1)
    rest = Path("held-out"), Path("cache"), task.rule, TokenizationRules(), sizes
    return BenchTask(name, Path("model"), data, *rest, max_new_tokens=8)


@pytest.mark.parametrize(
    ("name", "groups"), [("dpo", 4), ("lipo", 2), ("kto", 8), ("sft", 8), ("raft", 8)]
)
def test_every_method_gets_the_same_number_of_completions(name: str, groups: int) -> None:
    bench = bench_task("task", {kind: Path(kind) for kind in FILES})
    assert configuration(bench, name, 0, Path("output")).batch_size == groups


def test_pairs_serve_as_lists_of_two() -> None:
    bench = bench_task("stories", {"pairs": Path("given"), "lists": Path("given")})
    assert configuration(bench, "lipo", 0, Path("output")).batch_size == 4
    with pytest.raises(LookupError, match="labelled answers"):
        configuration(bench, "kto", 0, Path("output"))


def test_a_row_is_measured_once_for_its_settings_and_again_after_an_error(tmp_path: Path) -> None:
    calls: list[str] = []

    def measured(fail: bool = False) -> dict[str, Any]:
        calls.append("")
        if fail:
            raise ValueError("no")
        return {"win": 0.5}

    key, path = {"kind": "task", "method": "dpo", "seed": 0}, tmp_path / "rows.jsonl"
    Results(path).measure(key, {"lr": 1}, lambda: measured(fail=True))
    assert Results(path).rows[0]["error"] == "ValueError: no"
    for settings in ({"lr": 1}, {"lr": 1}, {"lr": 2}):
        Results(path).measure(key, settings, measured)
    assert len(calls) == 3
    (row,) = Results(path).rows
    assert row["win"] == 0.5 and row["settings"] == {"lr": 2}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in VARIANTS])
def test_both_arms_get_the_answers_of_the_same_pairs(name: str) -> None:
    sizes = CostSizes(pairs=3, prompt=4, completion=5, vocabulary=50)
    objective = objective_of(name)
    store, given = store_for(objective, sizes), store_for(objective_of("dpo"), sizes)
    check_data(store, objective, name)
    wanted = {answer.tobytes() for group in range(3) for answer in given.group(group)[1]}
    found = {answer.tobytes() for group in range(len(store)) for answer in store.group(group)[1]}
    assert found <= wanted
    assert found == wanted or "one answer instead of two" in asked(objective)


def test_only_methods_with_other_mathematics_ask_for_anything() -> None:
    assert not asked(objective_of("dpo")) and not asked(objective_of("ipo"))
    assert "mismatched answers" in asked(objective_of("kto"))
    assert "a pass that scores the whole update first" in asked(objective_of("mpo"))


def test_the_table_has_a_line_for_every_method_and_shows_errors(tmp_path: Path) -> None:
    results = Results(tmp_path / "none.jsonl")
    shared = {"kind": "task", "settings": {}, "samples": 50, "pairs": 50, "kl": 1.0, "words": 9.0}
    results.rows = [
        {**shared, "method": "dpo", "win": 0.6, "accuracy": 0.7, "seed": 0},
        {**shared, "method": "dpo", "win": 0.8, "accuracy": 0.9, "seed": 1},
        {"kind": "task", "method": "ipo", "seed": 0, "error": "ValueError: no", "settings": {}},
    ]
    lines = list(table(results))
    assert len(lines) == len(NAMES) + 2
    (dpo,) = [line for line in lines if line.startswith("| `dpo`")]
    assert "| 0.70 (0.60 to 0.78) | 0.60, 0.80 | 0.80 (" in dpo
    assert any("ValueError: no" in line for line in lines)
    assert np.unique([line.count("|") for line in lines]).size == 1
