"""Forecasts for clusters: memory by part, how a model is divided, advice, and refusals."""

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
from logratio.training.parallel import placement
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
    for part in ("weights", "optimizer"):
        assert getattr(hybrid.memory, part) == pytest.approx(getattr(eight.memory, part))
    # Of 16 GPUs, each has one micro-batch, whose gradients stay in bfloat16.
    assert hybrid.memory.gradients == pytest.approx(eight.memory.gradients / 2)
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
    planner: Any, ranks: int, per_host: int, mode: Any, gpu: str
) -> None:
    time = planner(ranks, min(per_host, ranks), gpu).forecast(mode).time
    products = time.compute + time.waiting
    assert min(time.compute, time.waiting, time.exposed, time.optimizer) >= 0
    if mode != "hsdp" or ranks <= per_host:  # else two networks work at the same time
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


def test_a_tile_has_no_more_positions_than_a_micro_batch(
    folders: Mapping[str, Path],
) -> None:
    short = store_of(*[(50, [30, 40])] * 8)
    found = planned(folders["8B"], short, Cluster(8, "h200"), batch_size=8).memory
    assert found.logits == 8 * (30 + 40) * 128_256
    longer = store_of(*[(50, [3000, 4000])] * 8)
    found = planned(folders["8B"], longer, Cluster(8, "h200"), batch_size=8).memory
    assert found.logits == 2**31  # the power of two below a 32nd of 141 GB without the model


def test_auto_shards_what_has_no_room_as_a_replica(
    folders: Mapping[str, Path], store: Store
) -> None:
    lora: dict[str, Any] = {"lora": LoraSettings()}
    small = planned(folders["8B"], store, Cluster(8, "h100"), **lora)
    assert (small.mode, small.why) == ("ddp", "")
    shards = planned(folders["8B"], store, Cluster(8, "h100"), precision="bf16")
    assert shards.mode == "fsdp"
    assert "because a replica would take 128 GB of each device" in shards.why
    assert "55.3 GB are free for them" in shards.why
    assert shards.fits
    replicas = planned(folders["8B"], store, Cluster(8, "h100"), precision="bf16", parallel="ddp")
    assert not replicas.fits
    hosts = planned(folders["8B"], store, Cluster(64, "h100"), precision="bf16", batch_size=128)
    assert hosts.mode == "hsdp"
    large = planned(folders["70B"], store, Cluster(64, "h100"), batch_size=128)
    assert large.mode == "fsdp"
    assert "because DDP would sum the gradients of bf16-weights in bfloat16" in large.why


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora": LoraSettings()},
        {"cache": None},
        {"lora": LoraSettings(), "quantization": "4bit", "cache": None},
        {"optimizer": "adamw-host", "precision": "bf16"},
    ],
)
def test_the_forecast_divides_a_model_as_the_trainer_does(
    more: dict[str, Any],
    precision: Any,
    folders: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both count the same bytes, which are about those of the forecast for one device."""
    cuda = torch.device("cuda")
    run = config(folders["8B"], **{"precision": precision} | more)
    needed = placement._replica_bytes(run, cuda)
    assert needed == Planner(run, Cluster(16, "h200").topology(), [], 2).division.needed
    folder = write_headers(tmp_path / "8b", ARCHITECTURES["llama-3.1-8b"])
    second = folder if more.get("cache", "") is None and not run.lora else None
    monkeypatch.setattr(memory, "default_device", lambda _: cuda)
    estimate = memory.training_bytes(replace(run, model=folder), second)
    assert needed == pytest.approx(estimate, rel=0.1)  # it takes 1% of the weights for adapters


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
    given: Any = store, Cluster(16, "h200")
    cached = planned(folders["8B"], *given, parallel="fsdp")
    frozen = planned(folders["8B"], *given, parallel="fsdp", cache=None)
    assert frozen.memory.weights == pytest.approx(2 * cached.memory.weights)
    assert frozen.time.compute == pytest.approx(cached.time.compute * 4 / 3, rel=0.05)
    # Its root is gathered once for the whole run, and its layers in each micro-batch.
    root, layers = 2 * 1.051e9, 2 * 6.979e9
    assert frozen.memory.gathered - cached.memory.gathered == pytest.approx(root, rel=1e-3)
    times = (3 * layers + root) / (2 * layers + root)
    assert frozen.time.gather == pytest.approx(cached.time.gather * times, rel=0.02)
    lora = planned(folders["8B"], *given, parallel="fsdp", lora=LoraSettings())
    apart = planned(folders["8B"], *given, parallel="fsdp", lora=LoraSettings(), cache=None)
    assert apart.memory.gathered == lora.memory.gathered
    assert apart.memory.weights == lora.memory.weights
    assert apart.time.compute > 1.2 * lora.time.compute


def test_adapters_reduce_little(folders: Mapping[str, Path], store: Store) -> None:
    cluster = Cluster(8, "h100")
    whole = planned(folders["8B"], store, cluster, parallel="fsdp")
    lora = planned(folders["8B"], store, cluster, parallel="fsdp", lora=LoraSettings())
    assert lora.time.reduce < 0.05 * whole.time.reduce
    assert lora.memory.optimizer < 0.01 * whole.memory.optimizer


def test_small_gradients_stay_whole_until_the_last_micro_batch(
    folders: Mapping[str, Path], store: Store
) -> None:
    cluster, shards = Cluster(8, "h100"), {"parallel": "fsdp"}
    one, four = (
        planned(folders["8B"], store, cluster, lora=LoraSettings(), token_budget=budget, **shards)
        for budget in (9600, 2400)
    )
    assert four.time.reduce == pytest.approx(one.time.reduce)
    assert four.time.gather == pytest.approx(4 * one.time.gather)
    whole = 4 * 41_943_040
    assert one.memory.gradients == whole / 8
    assert four.memory.gradients == whole / 8 + whole
    once, often = (
        planned(folders["8B"], store, cluster, token_budget=budget) for budget in (9600, 2400)
    )
    assert often.time.reduce == pytest.approx(4 * once.time.reduce)


def test_shards_of_gradients_have_the_dtype_of_their_weights_until_they_are_added_up(
    folders: Mapping[str, Path], store: Store
) -> None:
    once, often = (
        planned(folders["8B"], store, Cluster(8, "h200"), token_budget=budget)
        for budget in (9600, 2400)
    )
    assert once.memory.gradients == pytest.approx(2 * 8.030e9 / 8, rel=1e-3)
    assert often.memory.gradients == pytest.approx(4 * 8.030e9 / 8, rel=1e-3)


def test_layers_are_gathered_in_bfloat16_and_the_root_as_stored(
    folders: Mapping[str, Path], store: Store
) -> None:
    given: Any = folders["8B"], store, Cluster(8, "h200")
    root, layers = 1.051e9, 6.979e9
    mixed, low = (planned(*given, precision=precision) for precision in ("bf16", "bf16-weights"))
    ratio = (2 * 2 * layers + 4 * root) / (2 * 2 * layers + 2 * root)
    assert mixed.time.gather == pytest.approx(ratio * low.time.gather, rel=0.01)
    extra = mixed.memory.gathered - low.memory.gathered
    assert extra == pytest.approx(2 * root, rel=1e-3)


def test_a_quantized_base_is_whole_while_it_is_loaded(
    folders: Mapping[str, Path], store: Store
) -> None:
    given: dict[str, Any] = {"lora": LoraSettings(), "quantization": "4bit"}
    replicas = planned(folders["70B"], store, Cluster(8, "h100"), **given)
    assert replicas.mode == "ddp"
    assert replicas.memory.weights == pytest.approx(70.55e9 * 0.5625, rel=0.1)
    assert replicas.memory.loading == 0
    shards = planned(folders["70B"], store, Cluster(8, "h100"), parallel="fsdp", **given)
    assert shards.memory.loading == replicas.memory.weights + PROCESS_BYTES
    scales = 68.45e9 / 16  # each process has all of them
    expected = scales + (replicas.memory.weights - scales) / 8
    assert shards.memory.weights == pytest.approx(expected, rel=0.01)
    assert shards.memory.bytes == max(shards.memory.loading, shards.memory.training)
    small = planned(folders["405B"], store, Cluster(8, "h200"), **given)
    assert small.mode == "fsdp"
    assert not small.fits
    assert small.memory.training < small.capacity
    assert "while the quantized model is loaded" in small.advice[0]
    assert "--parallel" not in small.advice[0]
    eight: dict[str, Any] = given | {"quantization": "8bit", "parallel": "fsdp"}
    with pytest.raises(ConfigError, match="parallel fsdp is not possible: bitsandbytes keeps"):
        planned(folders["70B"], store, Cluster(8), **eight)


def test_state_on_the_host_is_not_on_the_gpu(folders: Mapping[str, Path], store: Store) -> None:
    run: dict[str, Any] = {"precision": "bf16"}
    there = planned(folders["8B"], store, Cluster(8, "b200"), optimizer="adamw-host", **run)
    here = planned(folders["8B"], store, Cluster(8, "b200"), parallel="ddp", **run)
    assert there.mode == "ddp"
    assert there.memory.optimizer == 0 < here.memory.optimizer
    assert there.time.optimizer > 5 * here.time.optimizer


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parallel": "ddp"}, "parallel ddp is not possible: DDP would sum the gradients of bf16-"),
        (
            {"parallel": "hsdp", "precision": "bf16", "optimizer": "adamw-host"},
            "parallel hsdp is not possible: the optimizer adamw-host keeps whole weights",
        ),
        (
            {"optimizer": "adamw-host"},
            "parallel auto is not possible: DDP would .*; and the optimizer adamw-host",
        ),
    ],
)
def test_settings_that_cannot_be_divided_are_refused(
    more: dict[str, Any], message: str, folders: Mapping[str, Path], store: Store
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(folders["8B"], store, Cluster(8), **more)


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
    plain = planned(folders["8B"], store, Cluster(16), parallel="fsdp")
    slow = Cluster(16, compute_share=0.215, network_gbps=100, link_share=0.5)
    found = planned(folders["8B"], store, slow, parallel="fsdp")
    assert found.time.compute == pytest.approx(2 * plain.time.compute)
    topology = slow.topology()
    assert topology.machine.network == 12.5e9
    assert topology.machine.shares.link == topology.machine.shares.network == 0.5
    assert found.time.gather > 3 * plain.time.gather


def test_advice_names_the_batch_size_that_hides_collectives(
    folders: Mapping[str, Path], store: Store
) -> None:
    cluster = Cluster(16, network_gbps=50)
    found = planned(folders["8B"], store, cluster, batch_size=16, parallel="fsdp")
    assert found.limit == "collectives"
    (advice,) = found.advice
    assert "collectives are exposed for" in advice
    assert f"as long as the collectives at {found.break_even:,.0f}" in advice
    assert "try --batch-size" in advice
    enough = int(advice.partition("--batch-size ")[2].split()[0].replace(",", ""))
    assert enough * 1200 / 16 == pytest.approx(found.break_even, rel=0.1)


def test_advice_compares_the_other_ways(folders: Mapping[str, Path], store: Store) -> None:
    """Adapters have few gradients to add up over the hosts, and the base stays in each host."""
    lora: dict[str, Any] = {"lora": LoraSettings(), "batch_size": 64}
    cluster = Cluster(16, "h200", network_gbps=25)
    found, host, copies = (
        planned(folders["8B"], store, cluster, parallel=way, **lora)
        for way in ("fsdp", "hsdp", "ddp")
    )
    assert copies.time.seconds < host.time.seconds < found.time.seconds
    assert f"--parallel ddp takes {copies.time.seconds:.2f} s per update" in found.advice[0]
    assert copies.advice == ()


def test_advice_on_a_small_token_budget(folders: Mapping[str, Path], store: Store) -> None:
    cluster, given = Cluster(8, "h100", link_share=0.1), {"batch_size": 128, "parallel": "fsdp"}
    (advice,) = planned(folders["8B"], store, cluster, token_budget=1200, **given).advice
    assert "try --token-budget" in advice
    assert "--batch-size" not in advice


def test_advice_names_what_saves_memory(folders: Mapping[str, Path], store: Store) -> None:
    given: Any = folders["405B"], store, Cluster(8, "h100")
    found = planned(*given, precision="bf16", parallel="ddp")
    assert found.limit == "memory"
    assert not found.fits
    (advice,) = found.advice
    for remedy in ("--parallel fsdp", "--lora", "more GPUs"):
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
