"""Losses of one's own by import path: trained like the table's, and tried before expensive work."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import write_pairs
from torch import Tensor

from logratio.errors import ConfigError
from logratio.training import GroupLogps, Method, Option, PairLogps, TrainConfig, dpo_loss, train
from logratio.training.methods.objective import Objective
from logratio.training.validation import check_settings


def shifted(pairs: PairLogps, *, beta: float = 0.1, shift: float = 0.0) -> Tensor:
    return dpo_loss(pairs, beta=beta) + shift


def first_only(groups: GroupLogps) -> Tensor:
    return -groups.table(groups.policy_logps, 0.0)[:, 0]


def summed(pairs: PairLogps) -> Tensor:
    return dpo_loss(pairs).sum()


def constant(pairs: PairLogps) -> Tensor:
    return torch.ones(2)


def infinite(pairs: PairLogps) -> Tensor:
    return dpo_loss(pairs) / 0.0


def failing(pairs: PairLogps) -> Tensor:
    raise KeyError("no such thing")


NOT_A_LOSS = 3
AS_METHOD = Method(
    "shifted DPO", shifted, "", "", options={"shift": Option(0.5, "added to the loss", high=1.0)}
)


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType("own_losses")
    vars(own).update({name: value for name, value in globals().items() if name[0] != "_"})
    monkeypatch.setitem(sys.modules, "own_losses", own)


def configured(loss: str, **settings: Any) -> TrainConfig:
    return TrainConfig("model", "data.jsonl", "out", loss=f"own_losses:{loss}", **settings)


@pytest.mark.parametrize("loss", ["shifted", "AS_METHOD"])
def test_it_trains_as_the_same_loss_of_the_table(
    loss: str, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    settings: dict[str, Any] = {"batch_size": 4, "lr": 1e-3, "report": False}
    table = train(TrainConfig(tiny_model, data, tmp_path / "table", **settings)).history
    settings |= {"loss": f"own_losses:{loss}", "loss_options": {"shift": 0.25}}
    own = train(TrainConfig(tiny_model, data, tmp_path / "own", **settings)).history
    for one, other in zip(table, own, strict=True):
        assert other["loss"] == pytest.approx(one["loss"] + 0.25, rel=1e-9)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)


def test_arguments_with_numbers_are_options_with_their_defaults() -> None:
    (term,) = Objective.of(configured("shifted", beta=0.3)).terms
    assert (term.beta, term.options) == (0.3, {"shift": 0.0})
    (term,) = Objective.of(configured("AS_METHOD")).terms
    assert (term.beta, term.options) == (0.1, {"shift": 0.5})
    (term,) = Objective.of(configured("first_only")).terms
    assert term.method.takes is GroupLogps
    assert term.method.beta is None


def test_a_weight_follows_the_path() -> None:
    first, second = Objective.of(configured("shifted:0.5+sft:0.2")).terms
    assert (first.weight, second.weight) == (0.5, 0.2)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("missing", "cannot be imported .AttributeError"),
        ("NOT_A_LOSS", "neither a function nor a Method"),
        ("summed", r"one loss per group, \[2\] for a sample, not \[\]"),
        ("constant", "no gradient"),
        ("infinite", "not finite on a sample"),
        ("failing", "failed on a sample: KeyError"),
    ],
)
def test_a_loss_that_cannot_work_is_refused_before_any_work(loss: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(configured(loss))


def test_options_of_its_own_are_checked() -> None:
    with pytest.raises(ConfigError, match="no option 'shfit'; its options are shift"):
        Objective.of(configured("shifted", loss_options={"shfit": 1.0}))
    with pytest.raises(ConfigError, match="shift must be 0 to 1, not 2"):
        Objective.of(configured("AS_METHOD", loss_options={"shift": 2.0}))
    with pytest.raises(ConfigError, match="has no beta"):
        Objective.of(configured("first_only", beta=0.2))
