"""Processes that compute each prompt together train the weights of one process, in float64."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from method_groups import write_answers
from rank_server import Ended, RankServer
from run_numbers import gap, numbers
from tiny_models import FAMILIES, WORDS, tiny, word_tokenizer

from logratio import DPOTrainer
from logratio.errors import ConfigError
from logratio.forecast import Forecast
from logratio.training.parallel.processes import Processes

TRAIN = "rank_workers:train_in_float64"
EXACT = 1e-12
Train = Callable[..., Path]

CASES: Mapping[str, Mapping[str, Any]] = {
    "dpo": {},
    "adapter": {"lora": {"rank": 4}, "lr": 1e-2, "activation_checkpointing": "all"},
    "cached": {"cache": "cache", "precompute": True, "loss": "ld-dpo"},
    "statistics": {"loss": "bco", "eval_share": 0.3, "eval_every": 2, "eval_samples": 2},
    "kto": {"loss": "kto"},
}


@pytest.fixture(scope="module")
def trained(ranks: RankServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a case once for each number of processes; return its folder."""
    folder = tmp_path_factory.mktemp("data")
    data = dict.fromkeys(CASES, write_pairs(folder / "pairs.jsonl", 14))
    data["kto"] = write_answers(folder / "answers.jsonl", 14)

    @cache
    def run(case: str, count: int, size: int = 1, parallel: str = "auto") -> Path:
        folder = tmp_path_factory.mktemp("run")
        settings = {
            **{"model": str(tiny_model), "data": str(data[case]), "output": str(folder / "out")},
            **{"batch_size": 4, "epochs": 1, "lr": 1e-3, "token_budget": 24, "report": False},
            **{"parallel": parallel, "context_parallel_size": size, **CASES[case]},
        }
        if "cache" in settings:
            settings["cache"] = str(folder / "cache")
        ranks(count, TRAIN, settings).well()
        return folder / "out"

    return run


@pytest.mark.parametrize(
    ("case", "count", "size", "parallel"),
    [
        ("dpo", 4, 2, "fsdp"),
        ("dpo", 3, 3, "fsdp"),
        ("adapter", 2, 2, "fsdp"),
        ("cached", 2, 2, "ddp"),
        ("statistics", 2, 2, "ddp"),
        ("kto", 2, 2, "ddp"),
    ],
)
def test_weights_and_metrics_equal_those_of_one_process(
    trained: Train, case: str, count: int, size: int, parallel: str
) -> None:
    alone, several = trained(case, 1), trained(case, count, size, parallel)
    assert gap(alone, several) < EXACT
    assert numbers(several) == pytest.approx(numbers(alone), rel=1e-9, abs=1e-9)


def test_a_run_continues_with_another_size(
    ranks: RankServer, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    def run(count: int, output: str, size: int, *until: int, resume: bool = False) -> Ended:
        settings = {
            **{"model": str(tiny_model), "data": str(pairs_file), "output": str(tmp_path / output)},
            **{"batch_size": 4, "epochs": 2, "lr": 1e-3, "token_budget": 24, "report": False},
            **{"context_parallel_size": size, "save_every": 1, "resume": resume},
        }
        return ranks(count, "rank_workers:train", settings, *until)

    run(1, "whole", 1).well()
    assert "saved update 3" in "".join(run(2, "parts", 2, 3).printed)
    run(1, "parts", 1, resume=True).well()
    assert 0 < gap(tmp_path / "whole", tmp_path / "parts", torch.float32) < 1e-5


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mistral", "a sliding window"), ("gemma3", "a sliding window"), ("phi3", None)],
)
def test_a_model_whose_prompts_cannot_be_split_is_refused_with_the_reason(
    ranks: RankServer, pairs_file: Path, tmp_path: Path, family: str, reason: str | None
) -> None:
    model = tmp_path / family
    config = FAMILIES[family]()
    config.vocab_size = len(WORDS)
    tiny(config).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    settings: dict[str, Any] = {"model": str(model), "data": str(pairs_file)}
    settings |= {
        "output": str(tmp_path / "out"),
        "context_parallel_size": 2,
        "max_steps": 1,
        "report": False,
    }
    ended = ranks(2, "rank_workers:train", settings)
    if reason is None:
        ended.well()
        return
    assert all(ended.codes)
    assert any("its prompts are not split" in text for text in ended.printed)
    assert any(reason in text for text in ended.printed)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "size 2 does not divide the number of processes, which is 1: start it with torchrun"),
        ({"share_beginnings": True}, "does not support share_beginnings"),
        ({"compile_layers": "on"}, "does not support compile_layers"),
        ({"loss": "bradley-terry"}, "which trains a reward model"),
        ({"loss": "wpo"}, "takes whole distributions"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        DPOTrainer(
            tiny_model, pairs_file, output=tmp_path / "out", context_parallel_size=2, **settings
        )


def test_one_process_forecasts_the_memory_of_each_of_several(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    def forecast(size: int) -> Forecast:
        settings: dict[str, Any] = {"token_budget": 1, "context_parallel_size": size}
        output = tmp_path / "out"
        return DPOTrainer(tiny_model, pairs_file, output=output, dry_run=True, **settings).forecast

    alone, several = forecast(1), forecast(4)
    assert several.memory_bytes < alone.memory_bytes
    assert several.seconds == pytest.approx(alone.seconds)
    assert "memory of one process, time of one that trains alone" in several.notes


def test_processes_with_the_same_data_count_once() -> None:
    every = [Processes(rank, 6) for rank in range(6)]
    for one in every:
        one.divide_prompts(3)
    assert [one.data_rank for one in every] == [0, 0, 0, 1, 1, 1]
    assert {one.data_count for one in every} == {2}
    assert [one.leads_share for one in every] == [True, False, False] * 2
