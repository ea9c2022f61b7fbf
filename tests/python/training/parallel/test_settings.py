"""Settings of a run in several processes: precisions, references, adapters, what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from rank_server import RankServer
from safetensors.torch import load_file
from tiny_models import save_tiny_model

TRAIN = "rank_workers:train"
ROUNDING = 1e-5
"""Largest difference of float32 weights; Adam magnifies rounding."""

Settings = dict[str, Any]


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Settings:
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    return {
        **{"model": str(tiny_model), "data": str(data), "batch_size": 4, "epochs": 2},
        **{"lr": 1e-3, "token_budget": 48, "report": False},
    }


def both(
    ranks: RankServer, settings: Settings, folder: Path, parallel: str = "fsdp"
) -> tuple[Path, Path]:
    """Train in one process and in two; return the folders."""
    settings, alone, several = settings | {"epochs": 1}, folder / "alone", folder / "several"
    ranks(1, TRAIN, settings | {"output": str(alone)}).well()
    ranks(2, TRAIN, settings | {"output": str(several), "parallel": parallel}).well()
    return alone, several


def gap(one: Path, other: Path) -> float:
    """Return the largest difference of two runs' weights."""
    left, right = (load_file(next(path.glob("*model.safetensors"))) for path in (one, other))
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def distance(one: Path, other: Path) -> float:
    """Return the Euclidean distance of two models."""
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    squares = [(left[name].double() - right[name].double()).square().sum() for name in left]
    return float(sum(squares) ** 0.5)


def losses(folder: Path) -> list[float]:
    """Return the losses of all updates."""
    return [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


CASES: Mapping[str, Settings] = {
    "recomputed activations": {"activation_checkpointing": "all"},
    "many settings": {"weight_decay": 0.1, "max_grad_norm": 0.1, "max_steps": 4, "seed": 3},
    "shared beginnings": {"share_beginnings": True},
}


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_equal_those_of_one_process(
    ranks: RankServer, settings: Settings, tmp_path: Path, case: str
) -> None:
    assert gap(*both(ranks, settings | CASES[case], tmp_path)) < ROUNDING


def test_another_reference_is_sharded_too(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    settings["reference"] = str(save_tiny_model(tmp_path / "reference", seed=1))
    alone, several = both(ranks, settings, tmp_path)
    assert gap(alone, several) < ROUNDING
    assert losses(several) == pytest.approx(losses(alone), abs=1e-5)
    assert losses(alone)[0] != pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_adapter_is_trained_further(
    ranks: RankServer, settings: Settings, tmp_path: Path, parallel: str
) -> None:
    first = settings | {"lora": {"rank": 2}, "output": str(tmp_path / "adapter")}
    ranks(1, TRAIN, first).well()
    settings |= {"model": first["output"], "adapter": "continue"}
    assert gap(*both(ranks, settings, tmp_path, parallel)) < ROUNDING


def test_pissa_starts_from_the_weights_that_only_the_first_rank_reads(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    settings["lora"] = {"rank": 2, "init": "orthogonal"}
    assert gap(*both(ranks, settings, tmp_path)) < ROUNDING


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_low_precision_trains_alike(
    ranks: RankServer, settings: Settings, tmp_path: Path, precision: str
) -> None:
    """Layers are gathered in bfloat16, and gradients are summed in float32."""
    alone, several = both(ranks, settings | {"precision": precision}, tmp_path)
    assert losses(several) == pytest.approx(losses(alone), abs=2e-2)
    assert distance(alone, several) < 0.25 * distance(alone, Path(settings["model"]))


def test_demonstrations_are_trained_on(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    assert gap(*both(ranks, settings | {"loss": "sft"}, tmp_path, "ddp")) < ROUNDING


def test_ranks_with_different_memory_recompute_the_same_layers(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    """Otherwise one would measure passes that the other does not make, and wait for ever."""
    settings |= {"parallel": "fsdp", "output": str(tmp_path / "out")}
    ended = ranks(2, "rank_workers:train_with_little_memory", settings, 1).well()
    assert "activation checkpointing: 2 of 2 layers" in ended.printed[0]


def test_a_weight_without_a_gradient_does_not_hang_ddp(
    ranks: RankServer, settings: Settings, tmp_path: Path
) -> None:
    settings |= {"parallel": "ddp", "output": str(tmp_path / "out")}
    ended = ranks(2, "rank_workers:train_with_an_unused_weight", settings)
    assert ended.codes == [0, 0], ended.printed
    assert len(losses(tmp_path / "out")) == 6


REFUSED: Mapping[str, tuple[Settings, str]] = {
    "ddp would sum in bfloat16": (
        {"parallel": "ddp", "precision": "bf16-weights"},
        "DDP would sum the gradients of bf16-weights in bfloat16",
    ),
    "state on the host": (
        {"parallel": "fsdp", "optimizer": "adamw-host"},
        "parallel fsdp is not possible: the optimizer adamw-host",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_the_reason(
    ranks: RankServer, settings: Settings, tmp_path: Path, case: str
) -> None:
    given, message = REFUSED[case]
    ended = ranks(2, TRAIN, settings | given | {"output": str(tmp_path / "out")})
    assert all(ended.codes)
    assert message.lower() in "".join(ended.printed).lower()


@pytest.mark.parametrize(
    ("first", "then", "async_save"), [(1, 2, None), (2, 1, False), (2, 3, True)]
)
def test_a_run_resumes_with_another_number_of_processes(
    ranks: RankServer,
    settings: Settings,
    tmp_path: Path,
    first: int,
    then: int,
    async_save: bool | None,
) -> None:
    settings |= {"save_every": 1, "async_save": async_save}
    settings |= {"eval_share": 0.3, "eval_every": 2, "best_metric": "loss", "parallel": "fsdp"}
    ranks(1, TRAIN, settings | {"output": str(tmp_path / "whole")}).well()
    settings |= {"output": str(tmp_path / "parts")}
    ended = ranks(first, TRAIN, settings, 3)
    assert all(ended.codes), ended.printed
    assert "saved update 3" in "".join(ended.printed)
    ranks(then, TRAIN, settings | {"resume": True}).well()
    assert gap(tmp_path / "whole", tmp_path / "parts") < ROUNDING
    rows = [
        json.loads(line)["eval_loss"]
        for folder in ("whole", "parts")
        for line in (tmp_path / folder / "evaluations.jsonl").read_text().splitlines()
    ]
    half = len(rows) // 2
    assert rows[half:] == pytest.approx(rows[:half], abs=1e-5)


def test_a_damaged_shard_is_skipped(ranks: RankServer, settings: Settings, tmp_path: Path) -> None:
    settings |= {"output": str(tmp_path / "out"), "parallel": "fsdp", "save_every": 1}
    ended = ranks(2, TRAIN, settings, 3)
    assert all(ended.codes)
    newest = max((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    shard = next(newest.glob("shards/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    resumed = ranks(2, TRAIN, settings | {"resume": True}).well()
    assert "skipped a damaged checkpoint" in resumed.printed[0]
    assert "resuming after update 2" in resumed.printed[0]
    assert not resumed.printed[1]


def test_evaluate_shares_the_pairs(ranks: RankServer, settings: Settings, tmp_path: Path) -> None:
    settings["output"] = str(tmp_path / "policy")
    ranks(1, TRAIN, settings).well()
    arguments = [
        *("evaluate", "--policy", settings["output"], "--reference", settings["model"]),
        *("--data", settings["data"], "--json"),
    ]
    for count in (1, 3):
        ranks(count, "logratio.cli.app:main", [*arguments, str(tmp_path / f"{count}.json")]).well()
    alone, several = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 3))
    numbers = {name for name, value in alone.items() if isinstance(value, int | float)}
    assert {"accuracy", "margin", "logratio_chosen"} < numbers
    assert {n: several[n] for n in numbers} == pytest.approx({n: alone[n] for n in numbers})
