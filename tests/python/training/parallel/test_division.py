"""How models are divided: what "auto" chooses from the numbers, and what is refused and why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from logratio.errors import ConfigError
from logratio.training import LoraSettings, TrainConfig
from logratio.training.parallel.division import (
    SHARE,
    SMALL_SHARE,
    Division,
    keeps_whole_gradients,
    reason_against,
)

FREE = 100.0
ROOM = SHARE * FREE


@pytest.fixture
def config(tiny_model: Path) -> TrainConfig:
    return TrainConfig(tiny_model, "data", "out", precision="bf16")


def division(config: TrainConfig, needed: float, processes: int, hosts: int) -> Division:
    return Division(config, needed, FREE, processes, hosts)


@pytest.mark.parametrize(
    ("needed", "processes", "hosts", "mode"),
    [
        (ROOM, 8, 1, "ddp"),
        (ROOM + 1, 8, 1, "fsdp"),
        (8 * ROOM, 16, 2, "hsdp"),
        (8 * ROOM + 1, 16, 2, "fsdp"),
        (8 * ROOM + 1, 1, 1, "one"),
    ],
)
def test_auto_replicates_what_has_room_and_shards_in_a_host_before_over_all(
    config: TrainConfig, needed: float, processes: int, hosts: int, mode: str
) -> None:
    found = division(config, needed, processes, hosts)
    assert found.mode == mode
    assert bool(found.why) == (mode in ("fsdp", "hsdp"))
    assert f"{mode}, because a replica would take" in found.why or not found.why


def test_auto_takes_the_way_that_is_possible(config: TrainConfig) -> None:
    host_optimizer = replace(config, optimizer="adamw-host")
    assert division(host_optimizer, 9 * ROOM, 8, 1).mode == "ddp"
    low = replace(config, precision="bf16-weights")
    assert division(low, 0.1 * ROOM, 8, 1).mode == "fsdp"
    assert "because DDP would sum" in division(low, 0.1 * ROOM, 8, 1).why
    assert division(replace(low, lora=LoraSettings()), 0.1 * ROOM, 8, 1).mode == "ddp"
    neither = division(replace(low, optimizer="adamw-host"), 0.1 * ROOM, 8, 1)
    with pytest.raises(ConfigError, match=r"parallel auto is not possible: DDP .*; and the opt"):
        _ = neither.mode


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
def test_a_given_way_is_taken_whatever_has_room(config: TrainConfig, parallel: Any) -> None:
    given = replace(config, parallel=parallel)
    for needed in (0.1 * ROOM, 100 * ROOM):
        assert division(given, needed, 16, 2).mode == parallel
        assert not division(given, needed, 16, 2).why
    assert division(given, ROOM, 1, 1).mode == ("one" if parallel == "ddp" else "fsdp")


@pytest.mark.parametrize(
    ("more", "mode", "message"),
    [
        ({"precision": "bf16-weights"}, "ddp", "in bfloat16: use parallel fsdp"),
        ({"lora": LoraSettings(), "quantization": "8bit"}, "fsdp", "use quantization 4bit"),
        ({"optimizer": "adamw8bit"}, "hsdp", "adamw8bit of bitsandbytes cannot read shards"),
        ({"loss": "tdpo1"}, "fsdp", "compares whole distributions of two models"),
        ({"optimizer": "adamw-host"}, "fsdp", "keeps whole weights on the host"),
    ],
)
def test_what_cannot_be_divided_has_a_reason_and_a_remedy(
    more: dict[str, Any], mode: Any, message: str, config: TrainConfig
) -> None:
    given = replace(config, **more)
    assert message in reason_against(given, mode)
    with pytest.raises(ConfigError, match=f"parallel {mode} is not possible: "):
        _ = division(replace(given, parallel=mode), 1.0, 16, 2).mode
    assert reason_against(given, "one") == ""


def test_a_base_in_4_bits_is_sharded_and_a_folder_with_quantized_weights_is_not(
    config: TrainConfig, tmp_path: Path
) -> None:
    four = replace(config, lora=LoraSettings(), quantization="4bit")
    assert reason_against(four, "fsdp") == reason_against(four, "ddp") == ""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    stored = replace(config, model=tmp_path, lora=LoraSettings())
    assert "the model's folder has quantized weights" in reason_against(stored, "fsdp")
    assert reason_against(stored, "ddp") == ""


def test_small_gradients_are_kept_whole() -> None:
    most = int(SMALL_SHARE * 1e6 / 4)
    assert keeps_whole_gradients(most, 1e6)
    assert not keeps_whole_gradients(most + 1, 1e6)
