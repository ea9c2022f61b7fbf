"""Data that does not fit a method is refused, with the place of the first row and a method."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pairs
from method_groups import store_for, write_answers, write_lists

from logratio.data.formats.settings import FormatSettings
from logratio.data.store.row_report import BadDataError
from logratio.errors import ConfigError
from logratio.training import (
    DPOTrainer,
    PrecomputeConfig,
    StaleCacheError,
    TrainConfig,
    precompute,
)
from logratio.training.methods.data_checks import check_data, kinds_of
from logratio.training.methods.group_data import GroupData
from logratio.training.methods.objective import Objective


def trainer(model: Path, data: Path, loss: str, **settings: Any) -> DPOTrainer:
    config = TrainConfig(model, data, data.parent / "out", loss=loss, **settings)
    return DPOTrainer(config=config, dry_run=True, show_progress=False)


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("kind", "loss", "advice"),
    [
        ("answers", "dpo", "kto"),
        ("answers", "plackett-luce", "kto"),
        ("lists", "kto", "plackett-luce"),
    ],
)
def test_rows_of_another_kind_name_their_place_and_what_trains_on_them(
    kind: str, loss: str, advice: str, tiny_model: Path, tmp_path: Path
) -> None:
    write = {"answers": write_answers, "lists": write_lists}[kind]
    data = write(tmp_path / f"{kind}.jsonl", 6)
    settings: dict[str, Any] = {}
    if kind == "lists":
        settings["formats"] = FormatSettings(lists="groups")
    with pytest.raises(BadDataError, match=advice) as caught:
        trainer(tiny_model, data, loss, **settings)
    assert f"{kind}.jsonl:1 [E206]" in str(caught.value)


@pytest.mark.parametrize("loss", ["kto", "bco-unpaired", "apo-zero-unpaired"])
def test_pairs_are_taken_apart_for_methods_of_labelled_answers(
    loss: str, tiny_model: Path, tmp_path: Path
) -> None:
    """As in TRL's KTOTrainer: chosen answers are good, rejected ones bad."""
    made = trainer(tiny_model, write_pairs(tmp_path / "pairs.jsonl", 6), loss)
    assert len(made.store) == 12
    assert kinds_of(made.store)["labelled answers"].all()
    own = made.store.roles()[made.store.completion_offsets()[:-1]]
    assert own.tolist() == [0, 1] * 6
    assert not list(tmp_path.glob("**/*.rows")) + list(tmp_path.glob("**/*.answers"))


def test_the_answers_of_pairs_are_those_that_a_cache_has(tiny_model: Path, tmp_path: Path) -> None:
    data, cache = write_pairs(tmp_path / "pairs.jsonl", 6), tmp_path / "cache"
    precompute(PrecomputeConfig(tiny_model, data, cache, mismatched=True), show_progress=False)
    assert trainer(tiny_model, data, "kto", cache=cache).cached


def test_a_list_is_no_pair_of_a_good_and_a_bad_answer(tiny_model: Path, tmp_path: Path) -> None:
    data = write_lists(tmp_path / "lists.jsonl", 6)
    with pytest.raises(ConfigError, match="makes several pairs"):
        trainer(tiny_model, data, "kto")
    best = FormatSettings(lists="best_worst")
    assert len(trainer(tiny_model, data, "kto", formats=best).store) == 12


def test_pairs_without_a_margin_are_refused_by_odpo(tiny_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "the cat", "chosen": " sits happy", "rejected": " sad", "margin": 1.5},
        {"prompt": "the dog", "chosen": " sits happy", "rejected": " sad"},
    ]
    with pytest.raises(ConfigError, match=r"needs a margin above 0 .*1 pair has none .*:2\)"):
        trainer(tiny_model, written(tmp_path / "pairs.jsonl", rows), "odpo")
    rows[1]["margin"] = 0.25
    assert len(trainer(tiny_model, written(tmp_path / "pairs.jsonl", rows), "odpo").store) == 2


def test_lists_whose_answers_are_all_tied_are_refused() -> None:
    objective = Objective.of(TrainConfig("m", "d", "o", loss="lipo"))
    check_data(store_for("lists"), objective, "lipo")
    values = store_for("lists").values()
    assert not np.isnan(values[:, 0]).any()
    with pytest.raises(ConfigError, match="all answers of 8 lists are tied"):
        check_data(store_for("lists", tied=True), objective, "lipo")


def test_weights_that_sum_to_zero_are_refused() -> None:
    objective = Objective.of(TrainConfig("m", "d", "o", loss="dpo"))
    with pytest.raises(ConfigError, match="sum to 0"):
        GroupData.of(store_for("pairs", weight=0.0), objective)


def test_a_dry_run_refuses_weights_that_sum_to_zero(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "chosen": " happy", "rejected": " sad", "weight": 0}]
    with pytest.raises(ConfigError, match="sum to 0"):
        trainer(tiny_model, written(tmp_path / "pairs.jsonl", rows), "dpo")


def test_a_cache_without_the_answers_to_other_prompts_names_the_flag(
    tiny_model: Path, tmp_path: Path
) -> None:
    data, cache = write_answers(tmp_path / "answers.jsonl", 6), tmp_path / "cache"
    filling = PrecomputeConfig(tiny_model, data, cache)
    for _ in ("without a cache", "without these answers"):
        with pytest.raises(StaleCacheError) as caught:
            trainer(tiny_model, data, "kto", cache=cache)
        assert "`logratio precompute --mismatched`" in " ".join(caught.value.__notes__)
        precompute(filling, show_progress=False)
    with pytest.raises(StaleCacheError) as plain:
        trainer(tiny_model, data, "bco-unpaired", cache=tmp_path / "none")
    assert not hasattr(plain.value, "__notes__")
    precompute(replace(filling, mismatched=True), show_progress=False)
    assert trainer(tiny_model, data, "kto", cache=cache).cached


def test_pairs_are_lists_of_two_whose_labels_override_scores(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = [
        {
            **{"prompt": f"the cat{' loud' * i}", "chosen": " sits happy", "rejected": " sad"},
            **{"score_chosen": 1.0, "score_rejected": 2.0},
        }
        for i in range(3)
    ]
    made = trainer(tiny_model, written(tmp_path / "pairs.jsonl", rows), "plackett-luce")
    data = GroupData.of(made.store, Objective.of(made.config))
    assert data.values is not None
    assert np.isnan(data.values[:, :2]).all()
    assert not np.isnan(made.store.values()[:, 0]).any()


@pytest.mark.parametrize("data", ["pairs", "labelled answers", "lists", "demonstrations"])
def test_every_kind_is_recognised(data: Any) -> None:
    found = kinds_of(store_for(data))
    assert found[data].all()
    assert {kind for kind, fits in found.items() if fits.all()} <= {data, "lists"}


def test_a_pair_of_each_list_is_no_data_of_a_method_for_lists(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = write_lists(tmp_path / "lists.jsonl", 4)
    for loss in ("plackett-luce", "lipo"):
        with pytest.raises(ConfigError, match=r"lists best_worst makes one pair .*whole lists"):
            trainer(tiny_model, data, loss, formats=FormatSettings(lists="best_worst"))
    assert len(trainer(tiny_model, data, "lipo").store) == 4
