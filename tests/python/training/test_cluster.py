"""Forecasts for clusters: memory by part, the choice of sharding, advice, and refusals."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster_page
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_models import ARCHITECTURES, write_headers
from stores import store_of

from logratio._rust import Store
from logratio.errors import ConfigError
from logratio.training import Cluster, ClusterForecast, LoraSettings, TrainConfig, memory
from logratio.training.accelerators import GPUS, Accelerator, known_gpu
from logratio.training.cluster import Planner
from logratio.training.cluster_plan import plan_with
from logratio.training.memory import PROCESS_BYTES
from logratio.training.rank_loads import rank_loads

SHARDED = ("weights", "gradients", "optimizer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return cluster_page.folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def store() -> Store:
    return store_of(*[(500, [300, 400])] * 128)


def config(model: Path, **more: Any) -> TrainConfig:
    return replace(cluster_page.settings(model, 8), **{"batch_size": 64} | more)


def planned(folder: Path, store: Store, cluster: Cluster, **more: Any) -> ClusterForecast:
    return plan_with(config(folder, **more), cluster, store)


@pytest.fixture(scope="module")
def planner(folders: Mapping[str, Path], store: Store) -> Any:
    """Makes planners for 8B by the number of GPUs and GPUs per host."""

    def made(ranks: int, per_host: int = 8, gpu: str = "h100") -> Planner:
        loads = rank_loads(config(folders["8B"]), store, ranks, torch.device("cuda"))
        topology = Cluster(ranks, gpu, gpus_per_host=per_host).topology()
        return Planner(config(folders["8B"]), topology, loads, 2)

    return made


def test_known_gpus_are_found_by_the_names_that_torch_reports() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A10": "a10",
        "NVIDIA L4": "l4",
        "NVIDIA L40S": "l40s",
        "NVIDIA B200": "b200",
    }
    assert {name: known_gpu(name) for name in names} == {n: GPUS[g] for n, g in names.items()}
    assert known_gpu("Tesla T4") is None


def test_sharded_parts_are_divided_by_the_gpus(planner: Any) -> None:
    one, eight = planner(1).forecast("ddp"), planner(8).forecast("fsdp")
    for part in SHARDED:
        assert getattr(eight.memory, part) == pytest.approx(getattr(one.memory, part) / 8)
    hybrid = planner(16).forecast("hsdp")
    for part in SHARDED:
        assert getattr(hybrid.memory, part) == pytest.approx(getattr(eight.memory, part))
    copies = planner(16).forecast("ddp")
    assert copies.memory.weights == one.memory.weights
    assert copies.memory.gathered == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 4), st.integers(1, 2))
def test_more_gpus_never_need_more_memory_for_what_is_sharded(
    planner: Any, power: int, step: int
) -> None:
    fewer, more = (planner(2**p).forecast("fsdp") for p in (power, power + step))
    for part in SHARDED:
        assert getattr(more.memory, part) <= getattr(fewer.memory, part)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([1, 2, 8]), st.sampled_from(
    ["ddp", "fsdp", "hsdp"]
), st.sampled_from(["h100", "a100", "l4"]))  # fmt: skip
def test_an_update_takes_at_least_its_products_and_at_most_the_sum(
    planner: Any, ranks: int, per_host: int, sharding: Any, gpu: str
) -> None:
    time = planner(ranks, min(per_host, ranks), gpu).forecast(sharding).time
    products = time.compute + time.waiting
    assert min(time.compute, time.waiting, time.exposed, time.optimizer) >= 0
    if sharding != "hsdp" or ranks <= per_host:  # else two networks work at the same time
        assert time.seconds >= time.gather + time.reduce + time.optimizer - 1e-9
    assert time.seconds >= products
    assert time.seconds <= products + time.gather + time.reduce + time.optimizer + 1e-9
    if ranks == 1:
        assert time.gather == time.reduce == time.exposed == 0
        assert time.waiting == pytest.approx(0, abs=1e-9)


def test_one_gpu_takes_the_memory_of_the_forecast(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, states and activations as `--dry-run` on one device, and a tile."""
    monkeypatch.setattr(memory, "default_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(memory, "seconds", lambda *_: 0.0)
    folder = write_headers(tmp_path / "8b", ARCHITECTURES["llama-3.1-8b"])
    for checkpointing in ("off", "all"):
        run = config(folder, activation_checkpointing=checkpointing, batch_size=6)
        found = plan_with(run, Cluster(1, "b200"), store).memory
        same = replace(run, token_budget=7200)  # all tokens of its one micro-batch
        expected = memory.training_forecast(same, store).memory_bytes
        padding = found.activations * 96 / 7296  # rows of a GPU are padded from 7,200
        assert found.process == PROCESS_BYTES
        assert found.bytes - found.logits - padding == pytest.approx(expected)


def test_auto_is_the_fastest_that_fits(folders: Mapping[str, Path], store: Store) -> None:
    small = planned(folders["8B"], store, Cluster(8, "b200"), lora=LoraSettings())
    ways: list[Any] = ["ddp", "fsdp"]
    each = [
        planned(folders["8B"], store, Cluster(8, "b200", sharding=way), lora=LoraSettings())
        for way in ways
    ]
    assert small == min(each, key=lambda one: one.time.seconds)
    whole = planned(folders["8B"], store, Cluster(8, "h100"))
    assert whole.sharding == "fsdp"
    copies = Cluster(8, "h100", sharding="ddp")
    assert not planned(folders["8B"], store, copies, precision="bf16").fits
    assert whole.fits


def test_auto_recomputes_as_few_layers_as_fit(folders: Mapping[str, Path], store: Store) -> None:
    found = planned(folders["8B"], store, Cluster(8, "h100"))
    assert 0 < found.layers_twice < 32
    off = planned(folders["8B"], store, Cluster(8, "h100"), activation_checkpointing="off")
    every = planned(folders["8B"], store, Cluster(8, "h100"), activation_checkpointing="all")
    assert not off.fits
    assert every.layers_twice == 32
    assert every.memory.bytes < found.memory.bytes <= found.capacity < off.memory.bytes
    assert off.time.compute < found.time.compute < every.time.compute
    saved = off.memory.activations - every.memory.activations
    assert saved == pytest.approx(7296 * 2 * 4096 * (31 * memory.KEPT - 32))


def test_a_frozen_reference_is_in_memory_and_computes(
    folders: Mapping[str, Path], store: Store
) -> None:
    cluster = Cluster(16, "h200", sharding="fsdp")
    cached = planned(folders["8B"], store, cluster)
    frozen = planned(folders["8B"], store, cluster, cache=None)
    assert frozen.memory.weights == pytest.approx(2 * cached.memory.weights)
    assert frozen.time.compute == pytest.approx(cached.time.compute * 4 / 3, rel=0.05)
    assert frozen.time.gather == pytest.approx(cached.time.gather * 1.53, rel=0.03)
    lora = planned(folders["8B"], store, cluster, lora=LoraSettings())
    apart = planned(folders["8B"], store, cluster, lora=LoraSettings(), cache=None)
    assert apart.memory.weights == lora.memory.weights
    assert apart.time.compute > 1.2 * lora.time.compute


def test_adapters_reduce_little(folders: Mapping[str, Path], store: Store) -> None:
    cluster = Cluster(8, "h100", sharding="fsdp")
    whole = planned(folders["8B"], store, cluster)
    lora = planned(folders["8B"], store, cluster, lora=LoraSettings())
    assert lora.time.reduce < 0.05 * whole.time.reduce
    assert lora.memory.optimizer < 0.01 * whole.memory.optimizer


def test_small_gradients_stay_whole_until_the_last_micro_batch(
    folders: Mapping[str, Path], store: Store
) -> None:
    cluster = Cluster(8, "h100", sharding="fsdp")
    one, four = (
        planned(folders["8B"], store, cluster, lora=LoraSettings(), token_budget=budget)
        for budget in (9600, 2400)
    )
    assert four.time.reduce == pytest.approx(one.time.reduce)
    assert four.time.gather == pytest.approx(4 * one.time.gather)
    whole = 4 * 41_943_040
    assert one.memory.gradients == whole / 8
    assert four.memory.gradients == whole / 8 + whole
    full = planned(folders["8B"], store, cluster, token_budget=2400)
    assert full.time.reduce == pytest.approx(
        4 * planned(folders["8B"], store, cluster, token_budget=9600).time.reduce
    )


def test_a_quantized_base_is_whole_on_each_gpu(folders: Mapping[str, Path], store: Store) -> None:
    given: dict[str, Any] = {"lora": LoraSettings(), "quantization": "4bit"}
    found = planned(folders["70B"], store, Cluster(8, "h100"), **given)
    assert found.sharding == "ddp"
    assert found.memory.weights == pytest.approx(70.55e9 * 0.5625, rel=0.1)
    with pytest.raises(ConfigError, match="FSDP2 cannot shard the 4bit weights"):
        planned(folders["70B"], store, Cluster(8, sharding="fsdp"), **given)


def test_state_on_the_host_is_not_on_the_gpu(folders: Mapping[str, Path], store: Store) -> None:
    run: dict[str, Any] = {"precision": "bf16"}
    there = planned(folders["8B"], store, Cluster(8, "b200"), optimizer="adamw-host", **run)
    here = planned(folders["8B"], store, Cluster(8, "b200", sharding="ddp"), **run)
    assert there.sharding == "ddp"
    assert there.memory.optimizer == 0 < here.memory.optimizer
    assert there.time.optimizer > 5 * here.time.optimizer


@pytest.mark.parametrize(
    ("more", "sharding", "message"),
    [
        ({}, "ddp", "sharding ddp is not possible: .* bf16-weights up in bfloat16"),
        ({"precision": "bf16", "optimizer": "adamw-host"}, "hsdp", "adamw-host cannot update sh"),
        ({"optimizer": "adamw-host"}, "auto", "in bfloat16; and the optimizer adamw-host cannot"),
    ],
)
def test_settings_that_cannot_be_sharded_are_refused(
    more: dict[str, Any], sharding: Any, message: str, folders: Mapping[str, Path], store: Store
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(folders["8B"], store, Cluster(8, sharding=sharding), **more)


def test_figures_follow_from_the_time(folders: Mapping[str, Path], store: Store) -> None:
    found = planned(folders["8B"], store, Cluster(8, "h100"), epochs=3)
    assert found.pairs == 64
    assert found.updates == 6
    assert found.tokens == 8 * 2 * 4864  # 4 of 8 groups, 4,800 tokens, padded to 128
    assert found.pairs_per_gpu_hour == pytest.approx(3600 * 8 / found.time.seconds)
    assert found.gpu_hours == pytest.approx(6 * 8 * found.time.seconds / 3600)
    flops = 6 * (6.98e9 * 8 * 9728 + 0.525e9 * 64 * 700)
    assert found.mfu == pytest.approx(flops / found.time.seconds / 8 / 989.4e12, rel=0.01)
    assert found.mfu < 0.43
    written = json.loads(json.dumps(found.to_dict()))
    assert written["memory"]["total"] == found.memory.bytes
    assert written["time"]["total"] == found.time.seconds
    assert written["fits"] is True


def test_shares_and_the_network_can_be_given(folders: Mapping[str, Path], store: Store) -> None:
    plain = planned(folders["8B"], store, Cluster(16, sharding="fsdp"))
    slow = Cluster(16, sharding="fsdp", compute_share=0.215, network_gbps=100, link_share=0.5)
    found = planned(folders["8B"], store, slow)
    assert found.time.compute == pytest.approx(2 * plain.time.compute)
    topology = slow.topology()
    assert topology.machine.network == 12.5e9
    assert topology.machine.shares.link == topology.machine.shares.network == 0.5
    assert found.time.gather > 3 * plain.time.gather


def test_advice_names_the_batch_size_that_hides_collectives(
    folders: Mapping[str, Path], store: Store
) -> None:
    cluster = Cluster(16, network_gbps=50, sharding="fsdp")
    found = planned(folders["8B"], store, cluster, batch_size=16)
    assert found.limit == "collectives"
    (advice,) = found.advice
    assert "collectives are exposed for" in advice
    assert f"as long as the collectives at {found.break_even:,.0f}" in advice
    assert "try --batch-size" in advice
    enough = int(advice.partition("--batch-size ")[2].split()[0].replace(",", ""))
    assert enough * 1200 / 16 == pytest.approx(found.break_even, rel=0.1)


def test_advice_compares_sharding_within_hosts(folders: Mapping[str, Path], store: Store) -> None:
    """Adapters have few gradients to add up over the hosts, and the base stays in each host."""
    lora: dict[str, Any] = {"lora": LoraSettings(), "batch_size": 64}
    cluster = Cluster(16, "h200", network_gbps=25, sharding="fsdp")
    found = planned(folders["8B"], store, cluster, **lora)
    other = planned(folders["8B"], store, replace(cluster, sharding="hsdp"), **lora)
    assert other.time.seconds < found.time.seconds
    assert f"--sharding hsdp takes {other.time.seconds:.2f} s per update" in found.advice[0]


def test_advice_on_a_small_token_budget(folders: Mapping[str, Path], store: Store) -> None:
    cluster = Cluster(8, "h100", link_share=0.1, sharding="fsdp")
    (advice,) = planned(folders["8B"], store, cluster, token_budget=1200, batch_size=128).advice
    assert "try --token-budget" in advice
    assert "--batch-size" not in advice


def test_advice_names_what_saves_memory(folders: Mapping[str, Path], store: Store) -> None:
    copies = Cluster(8, "h100", sharding="ddp")
    found = planned(folders["405B"], store, copies, precision="bf16")
    assert found.limit == "memory"
    assert not found.fits
    (advice,) = found.advice
    for remedy in ("--sharding fsdp", "--lora", "more GPUs"):
        assert remedy in advice


def test_advice_on_uneven_ranks(folders: Mapping[str, Path]) -> None:
    uneven = store_of(*[(4000, [3000, 500])] * 3, *[(50, [20, 20])] * 13)
    found = planned(folders["8B"], uneven, Cluster(8, "h200"), batch_size=16)
    assert any("waiting for the slowest rank" in sentence for sentence in found.advice)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world_size": 12}, "world_size 12 is no multiple of gpus_per_host 8"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": 8, "gpu": "h300"}, "gpu 'h300' is unknown; choose from b200"),
        ({"world_size": 8, "compute_share": 1.5}, "compute_share"),
        ({"world_size": 8, "sharding": "zero"}, "sharding"),
    ],
)
def test_an_impossible_cluster_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cluster(**given)


def test_figures_of_gpus_are_plausible() -> None:
    for gpu in GPUS.values():
        assert isinstance(gpu, Accelerator)
        assert 1e14 < gpu.flops < 1e16
        assert 2e10 < gpu.memory < 3e11
        assert gpu.network <= gpu.link < gpu.memory_bandwidth
