"""Settings for study: flipped labels and a uniform reference."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_pairs
from method_groups import store_for

from logratio.errors import ConfigError
from logratio.training import TrainConfig, train
from logratio.training.methods.group_data import GroupData
from logratio.training.methods.objective import Objective
from logratio.training.validation import check_settings


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    data = write_pairs(tmp_path / "pairs.jsonl", 16)
    return TrainConfig(
        tiny_model, data, tmp_path / "out", batch_size=16, lr=1e-3, report=False, max_steps=1
    )


def first_row(config: TrainConfig) -> dict[str, Any]:
    train(config, show_progress=False)
    row: dict[str, Any] = json.loads((Path(config.output) / "metrics.jsonl").read_text())
    return row


def test_flipped_pairs_exchange_their_sides(config: TrainConfig, tmp_path: Path) -> None:
    plain = first_row(replace(config, loss="simpo"))
    none = first_row(replace(config, loss="simpo", output=tmp_path / "none",
                             study_flipped_labels=1e-9))  # fmt: skip
    most = first_row(replace(config, loss="simpo", output=tmp_path / "most",
                             study_flipped_labels=1 - 1e-9))  # fmt: skip
    assert none["loss"] == plain["loss"]
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        assert most[f"logps/{side}"] == pytest.approx(plain[f"logps/{other}"], rel=1e-6)
        assert most[f"lengths/{side}"] == plain[f"lengths/{other}"]


@pytest.mark.parametrize("loss", ["tdpo2", "wpo", "aot", "bco"])
def test_flipped_pairs_take_all_of_a_side_with_them(
    config: TrainConfig, tmp_path: Path, loss: str
) -> None:
    """Exchanging the data's columns and all labels leaves the loss of an update as it is."""
    (data,) = config.data
    rows = [json.loads(line) for line in Path(str(data)).read_text().splitlines()]
    exchanged = tmp_path / "exchanged.jsonl"
    sides = {"chosen": "rejected", "rejected": "chosen", "prompt": "prompt"}
    exchanged.write_text(
        "".join(json.dumps({sides[name]: row[name] for name in row}) + "\n" for row in rows)
    )
    moved = replace(config, loss=loss, lr=1e-2, max_steps=2, warmup=0.0, max_grad_norm=1e9)
    plain = train(moved, show_progress=False).history
    flipped = replace(
        moved, data=exchanged, output=tmp_path / "flipped", study_flipped_labels=1 - 1e-9
    )
    for one, other in zip(plain, train(flipped, show_progress=False).history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_share_of_flipped_groups_is_the_rate_and_hangs_on_the_seed(loss: str) -> None:
    objective = Objective.of(TrainConfig("m", "d", "o", loss=loss))
    store = store_for(objective.data, groups=400)
    one, same, other = (GroupData.of(store, objective, 0.3, seed).flipped for seed in (0, 0, 1))
    assert one is not None and same is not None and other is not None
    assert 0.22 < one.mean() < 0.38
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_evaluations_keep_their_labels(config: TrainConfig) -> None:
    flipped = replace(config, loss="simpo", study_flipped_labels=0.9, eval_share=0.3, lr=1e-12)
    train(flipped, show_progress=False)
    plain = replace(flipped, study_flipped_labels=0.0, output=Path(config.output) / "plain")
    train(plain, show_progress=False)
    one, other = ((Path(c.output) / "evaluations.jsonl").read_text() for c in (flipped, plain))
    names = "eval_loss", "eval_logps/chosen"
    assert [json.loads(one)[n] for n in names] == [json.loads(other)[n] for n in names]


def test_a_uniform_reference_gives_each_token_the_same(config: TrainConfig) -> None:
    row = first_row(replace(config, study_uniform_reference=True))
    vocabulary = json.loads((Path(config.model) / "config.json").read_text())["vocab_size"]
    for side in ("chosen", "rejected"):
        expected = row[f"logps/{side}"] + row[f"lengths/{side}"] * math.log(vocabulary)
        assert row[f"logratios/{side}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"study_uniform_reference": True, "cache": "c"}, "remove cache"),
        ({"study_uniform_reference": True, "loss": "simpo"}, "no reference"),
        ({"study_flipped_labels": 0.1, "loss": "lipo"}, "trains on lists"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: TrainConfig, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(replace(config, **changes))
